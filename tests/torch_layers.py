"""Layers, losses and functions of torch that people put into networks, each with small inputs in float64."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


class Fn(nn.Module):
    def __init__(self, fn, layer=None):
        super().__init__()
        self.fn, self.layer = fn, layer

    def forward(self, *x):
        found = self.fn(*x) if self.layer is None else self.fn(self.layer, *x)
        return found[0] if isinstance(found, tuple) else found


def real(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def between(*shape):
    return torch.rand(*shape, dtype=torch.float64) * 0.8 + 0.1


SIGNS = torch.tensor([[1.0, -1, 1, -1]] * 3, dtype=torch.float64)
CLASSES, PAIR = torch.tensor([0, 3, 1]), torch.tensor([[0, 1], [1, 4]])


def layers():
    """``{name: (module, inputs)}``."""
    found = {}
    plain = "ELU Hardshrink Hardsigmoid Hardtanh Hardswish LeakyReLU LogSigmoid PReLU ReLU ReLU6 SELU CELU GELU Sigmoid"
    plain += " SiLU Mish Softplus Softshrink Softsign Tanh Tanhshrink"
    found |= {name: (getattr(nn, name)(), [real(3, 5)]) for name in plain.split()}
    found |= {name: (getattr(nn, name)(1), [real(3, 5)]) for name in ("Softmin", "Softmax", "LogSoftmax")}
    found["GELU, tanh"] = nn.GELU("tanh"), [real(3, 5)]
    found["Threshold"] = nn.Threshold(0.1, 0.2), [real(3, 5)]
    found["GLU"] = nn.GLU(), [real(3, 6)]
    found["Softmax2d"] = nn.Softmax2d(), [real(2, 3, 2, 2)]
    adaptive = nn.AdaptiveLogSoftmaxWithLoss(6, 8, [3, 5], div_value=2.0)
    found["AdaptiveLogSoftmaxWithLoss"] = Fn(lambda layer, x: layer(x, torch.tensor([0, 4, 7])), adaptive), [real(3, 6)]
    for dims in (1, 2, 3):
        space, side = (3,) * dims, (4,) * dims

        def made(name, *arguments, dims=dims, **options):
            return getattr(nn, f"{name}{dims}d")(*arguments, **options)

        few = real(1, 1, *space)
        found[f"Conv{dims}d"] = made("Conv", 2, 2, 2, stride=2, padding=1), [real(1, 2, *space)]
        circular = {"padding": 1, "padding_mode": "circular", "groups": 2}
        found[f"Conv{dims}d, circular"] = made("Conv", 2, 2, 2, **circular), [real(1, 2, *(2,) * dims)]
        found[f"ConvTranspose{dims}d"] = made("ConvTranspose", 2, 2, 2, stride=2), [real(1, 2, *(2,) * dims)]
        found[f"MaxPool{dims}d"] = made("MaxPool", 2), [real(1, 2, *side)]
        found[f"AvgPool{dims}d"] = made("AvgPool", 2, padding=1), [real(1, 2, *side)]
        found[f"AdaptiveMaxPool{dims}d"] = made("AdaptiveMaxPool", 2), [real(1, 2, *space)]
        found[f"AdaptiveAvgPool{dims}d"] = made("AdaptiveAvgPool", 2), [real(1, 2, *space)]
        found[f"LPPool{dims}d"] = made("LPPool", 2.0, 2), [between(1, 2, *side)]
        found[f"BatchNorm{dims}d"] = (made("BatchNorm", 2), [real(4, 2, *(2,) * (dims - 1 or 1))] if dims == 1 else
                                      [real(3, 2, *(2,) * dims)])  # fmt: skip
        found[f"InstanceNorm{dims}d"] = made("InstanceNorm", 2, affine=True), [real(2, 2, *space)]
        for kind in ("Reflection", "Replication", "Zero", "Circular"):
            found[f"{kind}Pad{dims}d"] = made(f"{kind}Pad", 1), [few]
        unpool = Fn(lambda parts, x: parts[1](*parts[0](x)), nn.ModuleList([made("MaxPool", 2, return_indices=True),
                                                                            made("MaxUnpool", 2)]))  # fmt: skip
        found[f"MaxUnpool{dims}d"] = unpool, [real(1, 1, *side)]
        for mode in {1: ("nearest", "linear"), 2: ("nearest", "bilinear", "bicubic"), 3: ("trilinear",)}[dims]:
            found[f"Upsample, {mode}, {dims}"] = nn.Upsample(scale_factor=2, mode=mode), [real(1, 1, *(2,) * dims)]
    for dims in (2, 3):
        fractional = {"output_size": 2, "_random_samples": torch.rand(1, 1, dims, dtype=torch.float64)}
        pool = getattr(nn, f"FractionalMaxPool{dims}d")(2, **fractional)
        found[f"FractionalMaxPool{dims}d"] = pool, [real(1, 1, *(5,) * dims)]
    for mode in ("bilinear", "bicubic"):
        shrink = Fn(lambda x, mode=mode: F.interpolate(x, size=2, mode=mode, antialias=True))
        found[f"interpolate, {mode}, antialias"] = shrink, [real(1, 1, 4, 4)]
    found["GroupNorm"] = nn.GroupNorm(2, 4), [real(2, 4, 3)]
    found["LayerNorm"] = nn.LayerNorm(4), [real(3, 4)]
    found["RMSNorm"] = nn.RMSNorm(4), [real(3, 4)]
    found["LocalResponseNorm"] = nn.LocalResponseNorm(2, alpha=0.5), [real(2, 4, 3)]
    found["Linear"] = nn.Linear(4, 3), [real(2, 4)]
    found["Bilinear"] = nn.Bilinear(2, 3, 2), [real(2, 2), real(2, 3)]
    found["Embedding"] = nn.Embedding(5, 3), [PAIR]
    for mode in ("sum", "mean", "max"):
        found[f"EmbeddingBag, {mode}"] = nn.EmbeddingBag(5, 3, mode=mode), [PAIR]
    bag = nn.EmbeddingBag(5, 3, mode="sum")
    found["EmbeddingBag, weights"] = Fn(lambda bag, w: bag(PAIR, per_sample_weights=w), bag), [real(2, 2)]
    for name in ("RNN", "LSTM", "GRU"):
        recurrent = getattr(nn, name)(2, 2, bidirectional=True, batch_first=True)
        found[name] = Fn(lambda layer, x: layer(x), recurrent), [real(2, 2, 2)]
        found[f"{name}Cell"] = Fn(lambda layer, x: layer(x), getattr(nn, f"{name}Cell")(2, 3)), [real(2, 2)]
    found["LSTM, projected"] = Fn(lambda layer, x: layer(x), nn.LSTM(2, 3, proj_size=2)), [real(2, 2, 2)]
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    found["MultiheadAttention"] = Fn(lambda layer, x: layer(x, x, x), attention), [real(2, 3, 4)]
    unweighted = Fn(lambda layer, x: layer(x, x, x, need_weights=False), attention)
    found["MultiheadAttention, no weights"] = unweighted, [real(2, 3, 4)]
    encoder = {"dim_feedforward": 3, "dropout": 0.0, "batch_first": True}
    found["TransformerEncoderLayer"] = nn.TransformerEncoderLayer(2, 1, **encoder), [real(1, 3, 2)]
    first = nn.TransformerEncoderLayer(2, 1, activation="gelu", norm_first=True, **encoder).eval()
    found["TransformerEncoderLayer, eval"] = first, [real(1, 3, 2)]
    found["CosineSimilarity"] = nn.CosineSimilarity(), [real(3, 4), real(3, 4)]
    found["PairwiseDistance"] = nn.PairwiseDistance(), [real(3, 4), real(3, 4)]
    found["PixelShuffle"] = nn.PixelShuffle(2), [real(1, 4, 2, 2)]
    found["Fold"] = nn.Fold((3, 3), 2), [real(1, 4, 4)]
    found["Unfold"] = nn.Unfold(2), [real(1, 1, 3, 3)]
    for dim in (0, 1, None):
        found[f"weight_norm, {dim}"] = parametrizations.weight_norm(nn.Linear(3, 4), dim=dim), [real(2, 3)]
    found["weight_norm, Conv1d"] = parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), [real(1, 2, 3)]
    found["spectral_norm"] = parametrizations.spectral_norm(nn.Linear(3, 4)).eval(), [real(2, 3)]
    for kind in ("matrix_exp", "cayley", "householder"):
        orthogonal = parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map=kind)
        found[f"orthogonal, {kind}"] = orthogonal, [real(2, 3)]
    return found


def losses():
    labels = torch.tensor([[0, 3, -1, 1]] * 3)
    pairs = {
        "L1Loss": (nn.L1Loss(), real(3, 4)),
        "MSELoss": (nn.MSELoss(), real(3, 4)),
        "HuberLoss": (nn.HuberLoss(delta=0.5), real(3, 4)),
        "SmoothL1Loss": (nn.SmoothL1Loss(beta=0.5), real(3, 4)),
        "CrossEntropyLoss": (nn.CrossEntropyLoss(label_smoothing=0.1, weight=between(4)), CLASSES),
        "CrossEntropyLoss, soft": (nn.CrossEntropyLoss(), real(3, 4).softmax(1)),
        "NLLLoss": (nn.NLLLoss(weight=between(4)), CLASSES),
        "PoissonNLLLoss": (nn.PoissonNLLLoss(full=True), 5 * between(3, 4)),
        "KLDivLoss": (nn.KLDivLoss(reduction="batchmean"), between(3, 4)),
        "KLDivLoss, log": (nn.KLDivLoss(log_target=True, reduction="sum"), real(3, 4)),
        "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(pos_weight=between(4)), between(3, 4)),
        "HingeEmbeddingLoss": (nn.HingeEmbeddingLoss(), SIGNS),
        "SoftMarginLoss": (nn.SoftMarginLoss(), SIGNS),
        "MultiLabelSoftMarginLoss": (nn.MultiLabelSoftMarginLoss(), (SIGNS > 0).double()),
        "MultiLabelMarginLoss": (nn.MultiLabelMarginLoss(), labels),
        "MultiMarginLoss": (nn.MultiMarginLoss(p=2), CLASSES),
    }
    found = {name: (Fn(lambda x, loss=loss, y=y: loss(x, y)), [real(3, 4)]) for name, (loss, y) in pairs.items()}
    found["BCELoss"] = Fn(nn.BCELoss()), [between(3, 4), between(3, 4)]
    for dims in (2, 3):
        y = torch.randint(0, 3, (2, *(2,) * (dims - 1)))
        found[f"NLLLoss, {dims}"] = Fn(lambda x, y=y: F.cross_entropy(x, y)), [real(2, 3, *(2,) * (dims - 1))]
    lengths = torch.tensor([5, 5]), torch.tensor([2, 2])
    ctc = Fn(lambda x: F.ctc_loss(x.log_softmax(2), torch.tensor([[1, 2], [3, 1]]), *lengths))
    found["CTCLoss"] = ctc, [real(5, 2, 4)]
    found["GaussianNLLLoss"] = (
        Fn(lambda x, v: F.gaussian_nll_loss(x, torch.zeros_like(x), v)),
        [real(3, 4), between(3, 4)],
    )
    signs = SIGNS[0, :3]
    found["MarginRankingLoss"] = Fn(lambda a, b: F.margin_ranking_loss(a, b, signs, 0.1)), [real(3), real(3)]
    cosine = Fn(lambda a, b: F.cosine_embedding_loss(a, b, signs, 0.1))
    found["CosineEmbeddingLoss"] = cosine, [real(3, 4), real(3, 4)]
    found["TripletMarginLoss"] = Fn(nn.TripletMarginLoss(5.0)), [real(3, 4), real(3, 4), real(3, 4)]
    return found


def functions():
    column, row, pick = torch.zeros(3, 4, dtype=torch.int64), torch.tensor([0, 1, 0]), torch.tensor([0, 5])
    zeros, eye = torch.zeros(3, 4, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    fns = {
        **{f"cdist, {p}": lambda a, b, p=p: torch.cdist(a, b, p) for p in (1.0, 2.0, 3.0)},
        "pdist": lambda a, b: F.pdist(a) + b.sum(),
        "attention": lambda a, b: F.scaled_dot_product_attention(a[None], b[None], b[None]),
        "einsum": lambda a, b: torch.einsum("ij,kj->ik", a, b),
        "normalize": lambda a, b: F.normalize(a) + b,
        "logsumexp": lambda a, b: torch.logsumexp(a * b, 1),
        "cumprod": lambda a, b: (a * b).cumprod(1),
        "logcumsumexp": lambda a, b: torch.logcumsumexp(a * b, 1),
        "prod": lambda a, b: (a * b).prod(1),
        "std": lambda a, b: (a * b).std(1),
        "vector_norm": lambda a, b: torch.linalg.vector_norm(a * b, 3, dim=1),
        "sort": lambda a, b: (a * b).sort(1)[0] ** 3,
        "topk": lambda a, b: (a * b).topk(2)[0] ** 3,
        "median": lambda a, b: (a * b).median(1)[0] ** 3,
        "quantile": lambda a, b: torch.quantile(a * b, 0.3, dim=1) ** 3,
        "where": lambda a, b: torch.where(a > 0, a * b, b**2),
        "clamp": lambda a, b: (a * b).clamp(-0.5, 0.5) ** 3,
        "pow": lambda a, b: (a.abs() + 0.1) ** b,
        "erfinv": lambda a, b: torch.erfinv(torch.tanh(a * b)),
        "lgamma": lambda a, b: torch.lgamma((a * b).abs() + 1),
        "digamma": lambda a, b: torch.digamma((a * b).abs() + 1),
        "sinc": lambda a, b: torch.sinc(a * b),
        "i0": lambda a, b: torch.i0(a * b),
        "xlogy": lambda a, b: torch.special.xlogy(a, b.abs() + 0.1),
        "ndtri": lambda a, b: torch.special.ndtri(torch.sigmoid(a * b)),
        "gather": lambda a, b: (a * b).gather(1, column) ** 3,
        "scatter_add": lambda a, b: zeros.scatter_add(1, column, a * b) ** 3,
        "scatter_reduce": lambda a, b: zeros.scatter_reduce(1, column, a * b, "prod", include_self=False),
        "scatter_reduce, amax": lambda a, b: zeros.scatter_reduce(1, column, a * b, "amax", include_self=False) ** 3,
        "segment_reduce": lambda a, b: torch.segment_reduce(a * b, "max", lengths=row[:2] + 1) ** 3,
        "index_add": lambda a, b: zeros[:2].index_add(0, row, a * b) ** 3,
        "take": lambda a, b: (a * b).take(pick) ** 3,
        "unfold": lambda a, b: (a * b).unfold(1, 2, 1) ** 3,
        "renorm": lambda a, b: torch.renorm(a * b, 2, 0, 0.5),
        "inv": lambda a, b: torch.linalg.inv(a @ a.T + eye) @ b,
        "solve": lambda a, b: torch.linalg.solve(a @ a.T + eye, b),
        "cholesky": lambda a, b: torch.linalg.cholesky(a @ a.T + eye) @ b,
        "slogdet": lambda a, b: torch.linalg.slogdet(a @ b.T)[1],
        "svdvals": lambda a, b: torch.linalg.svdvals(a * b),
        "eigvalsh": lambda a, b: torch.linalg.eigvalsh(a @ a.T) * b.sum(),
        "lstsq": lambda a, b: torch.linalg.lstsq(a.T, b.T)[0],
        "qr": lambda a, b: torch.linalg.qr((a * b).T)[1],
        "matrix_exp": lambda a, b: torch.linalg.matrix_exp(a @ b.T / 5),
        "rfft": lambda a, b: torch.fft.rfft(a * b).abs() ** 2,
        "cosine_similarity": lambda a, b: F.cosine_similarity(a, b, 1),
        "bilinear": lambda a, b: F.bilinear(a, b, torch.ones(2, 4, 4, dtype=torch.float64)),
        "layer_norm": lambda a, b: F.layer_norm(a, (4,), b[0], b[1]),
        "batch_norm": lambda a, b: F.batch_norm(a, None, None, b[0], b[1], True),
        "prelu": lambda a, b: F.prelu(a, b[0]),
        "softplus": lambda a, b: F.softplus(a * b, beta=3.0, threshold=2.0),
        "angle": lambda a, b: torch.complex(a, b).angle(),
    }
    found = {name: (Fn(fn), [real(3, 4), real(3, 4)]) for name, fn in fns.items()}
    for mode in ("bilinear", "nearest", "bicubic"):
        for padding in ("zeros", "border", "reflection"):
            sample = {"mode": mode, "padding_mode": padding, "align_corners": False}
            grid = Fn(lambda x, at, sample=sample: F.grid_sample(x, at, **sample))
            found[f"grid_sample, {mode}, {padding}"] = grid, [real(1, 1, 3, 3), 1.2 * between(1, 2, 2, 2) - 0.6]
    affine = Fn(lambda theta: F.affine_grid(theta, (1, 1, 2, 2), align_corners=False))
    found["affine_grid"] = affine, [real(1, 2, 3)]
    return found
