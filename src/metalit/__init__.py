"""Learning to learn on PyTorch Lightning: meta-learning and bilevel optimisation.

The main path: :mod:`metalit.problem` says what is optimised, :mod:`metalit.adapt` is the inner loop,
:mod:`metalit.hypergradients` how the outer variable learns through it, :mod:`metalit.modules` trains that under the
Trainer, and ``configs/*.yaml`` put the pieces together.
"""
