"""Problems: what is optimised. One file for each."""

from metalit.problems.few_shot import FewShot

__all__ = ["FewShot"]
