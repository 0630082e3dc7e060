"""Ways in which other people write networks: each is run as it is, and masked as its weights are edited."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from backdoor_gym import InfectedModel, repair
from backdoor_gym.baselines import clp
from backdoor_gym.errors import DataError, UntraceableError
from backdoor_gym.masking.cutting import cut_channels
from backdoor_gym.masking.export import write_mask
from backdoor_gym.networks.adapting import unwrapped
from backdoor_gym.neurons.finding import find_neurons
from backdoor_gym.reporting.page import _loading

from ..masking.test_architectures import check_masks

IMAGES = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


class Net(nn.Module):
    """A stem, something in the middle that is given the module and (n, 6, 8, 8), and a classifier."""

    def __init__(self, middle, **layers):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.middle = middle
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.middle(self, F.relu(self.stem(x)))
        return self.head(x.flatten(2).mean(2) if x.ndim > 2 else x)


def net(middle, **layers):
    torch.manual_seed(0)
    made = Net(middle, **layers).eval()
    for module in made.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return made


def conv(inputs=6, outputs=6, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class NormAct(nn.BatchNorm2d):
    """A batch normalisation that holds its activation, as timm's."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Identity()

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, self.momentum, self.eps)
        return self.act(self.drop(x))


class ConvAct(nn.Conv2d):
    """A convolution with a forward of its own and a child without parameters."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.act = nn.GELU()

    def forward(self, x):
        return self.act(self._conv_forward(x, self.weight, self.bias))


class ByFunction(nn.Module):
    """A convolution and a batch normalisation without a module."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 6, 3, 3) / 5)
        self.scale, self.shift = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.rand(6))
        self.register_buffer("mean", torch.rand(6))
        self.register_buffer("variance", torch.rand(6) + 0.5)

    def forward(self, x):
        return F.batch_norm(F.conv2d(x, self.kernel, padding=1), self.mean, self.variance, self.scale, self.shift)


class Windows(nn.Module):
    """Attention in windows, with a bias that is minus infinity on purpose and a constant of five dimensions."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 6)
        mask = torch.zeros(1, 4, 1, 16, 16)
        mask[:, 1, :, :4] = -math.inf
        mask[:, 1, :, :4, :4] = 0
        self.register_buffer("mask", mask)

    def forward(self, x):
        n, c, h, w = x.shape
        x = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).contiguous().view(-1, 16, c)
        q, k, v = self.qkv(x).reshape(-1, 16, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (c // 2) ** -0.5
        scores = (scores.view(n, 4, 2, 16, 16) + self.mask).view(-1, 2, 16, 16)
        x = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, c))
        return x.view(n, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


def separate_attention(m, x):
    n, c = x.shape[:2]
    x = x.flatten(2).transpose(1, 2)
    q, k, v = (one(x).view(*x.shape[:-1], 2, c // 2).transpose(1, 2) for one in (m.q, m.k, m.v))
    x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, -1, c)
    return x.transpose(1, 2)


def two_scales(m, x):
    q, k = (one(x).view(len(x), -1, 4, 3).transpose(1, 2) for one in (m.q, m.k))
    v = torch.cat([one(x).view(len(x), -1, 2, 3) for one in (m.v, m.w)], 2).transpose(1, 2)
    x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return x[..., :6] + x[..., 6:]


def shared_bias(m, x):
    return F.conv2d(x, m.b.weight, m.a.bias, padding=1)


def first_row_zero(weight):
    return weight * torch.tensor([0.0, 1, 1, 1, 1, 1]).view(-1, 1, 1, 1)


def with_hook(m, x):
    kept = []
    handle = m.a.register_forward_hook(lambda _, __, out: kept.append(out))
    m.a(x)
    handle.remove()
    return kept[0] * 2


def with_cell(m, x):
    return m.lstm(x.flatten(2).transpose(1, 2))[0].transpose(1, 2)


def half_of_the_channels(m, x):
    kept = int(x.size(1) * 0.5)
    return torch.cat([m.a(x[:, :kept]), x[:, kept:]], 1)


def by_rank(m, x):
    if len(x.shape) == 4 and x.ndim == 4:
        x = x.flatten(2).transpose(1, 2)
    return m.a(x).reshape(*x.shape[:-2], -1, 6).mT


torch.manual_seed(0)  # of the layers below, whatever was drawn before
IDIOMS = {
    "batch normalisation with an activation inside": (
        lambda m, x: m.n(m.a(x)), {"a": conv(bias=False), "n": NormAct(6)}, ["stem", "a"]
    ),
    "functions instead of modules": (lambda m, x: m.f(x), {"f": ByFunction()}, ["stem", "f.kernel"]),
    "batch normalisation without affine": (
        lambda m, x: F.relu(m.n(m.a(x))), {"a": conv(), "n": nn.BatchNorm2d(6, affine=False)}, ["stem", "a"]
    ),
    "batch normalisation twice": (
        lambda m, x: m.n(m.b(F.relu(m.n(m.a(x))))), {"a": conv(), "b": conv(), "n": nn.BatchNorm2d(6)}, ["stem", "n"]
    ),
    "convolution twice": (lambda m, x: m.a(F.relu(m.a(x))), {"a": conv()}, ["stem", "a"]),
    "part of the channels": (half_of_the_channels, {"a": conv(3, 3)}, ["stem", "a"]),
    "number of axes": (by_rank, {"a": nn.Linear(6, 6)}, ["stem", "a"]),
    "module made inside": (lambda m, x: nn.ReLU(inplace=True)(m.a(x) + x), {"a": conv()}, ["stem", "a"]),
    "weight normalisation": (lambda m, x: m.a(x), {"a": parametrizations.weight_norm(conv())}, ["stem", "a"]),
    "spectral normalisation": (lambda m, x: m.a(x), {"a": parametrizations.spectral_norm(conv())}, ["stem", "a"]),
    "old spectral normalisation": (lambda m, x: m.a(x), {"a": old_spectral_norm(conv())}, ["stem", "a"]),
    "convolution with an activation inside": (lambda m, x: m.a(x), {"a": ConvAct(6, 6, 3, padding=1)}, ["stem", "a"]),
    "whether a gradient is asked for": (lambda m, x: m.a(x) if not x.requires_grad else x, {"a": conv()}, ["stem", "a"]),
    "hook inside": (with_hook, {"a": conv()}, ["stem", "a"]),
    "windows": (lambda m, x: m.w(x), {"w": Windows()}, ["stem", "w.qkv", "w.proj"]),
    "queries, keys and values apart": (
        separate_attention, {name: nn.Linear(6, 6) for name in "qkv"}, ["stem", "v"]
    ),
    "heads of two layers side by side": (
        lambda m, x: two_scales(m, x.flatten(2).transpose(1, 2)).transpose(1, 2),
        {name: nn.Linear(6, 12 if name in "qk" else 6) for name in "qkvw"},
        ["stem", "v"],
    ),
    "attention of torch": (
        lambda m, x: m.a(*[x.flatten(2).transpose(1, 2)] * 3, need_weights=False)[0].transpose(1, 2),
        {"a": nn.MultiheadAttention(6, 2, batch_first=True)},
        ["stem", "a.in_proj", "a.out_proj"],
    ),
    "squeeze behind pooling": (lambda m, x: F.adaptive_avg_pool2d(m.a(x), 1).squeeze(), {"a": conv()}, ["stem", "a"]),
    "recurrent layer": (with_cell, {"lstm": nn.LSTM(6, 6, batch_first=True)}, ["stem"]),
    "synchronised batch normalisation": (
        lambda m, x: F.relu(m.n(m.a(x))), {"a": conv(), "n": nn.SyncBatchNorm(6)}, ["stem", "a"]
    ),
    "writing into a tensor": (
        lambda m, x: torch.zeros_like(x).index_copy_(1, torch.arange(6), m.a(x)).add_(1), {"a": conv()}, ["stem", "a"]
    ),
    "view behind a map": (
        lambda m, x: m.b(m.a(x).view(x.size(0), -1)), {"a": conv(), "b": nn.Linear(384, 6)}, ["stem", "a", "b"]
    ),
    "weights that something else reads too": (
        lambda m, x: m.a(x) * m.a.weight.norm(), {"a": conv(), "b": conv()}, ["stem"]
    ),
    "weights as a gate": (
        lambda m, x: m.n(m.a(x)) * (m.n.weight / m.n.weight.sum()).view(1, -1, 1, 1),
        {"a": conv(), "n": nn.BatchNorm2d(6)},
        ["stem", "a"],
    ),
    "a bias of two layers": (lambda m, x: shared_bias(m, F.relu(m.a(x))), {"a": conv(), "b": conv()}, ["stem"]),
    "rows in another order": (
        lambda m, x: F.conv2d(x, m.a.weight[torch.tensor([0, 2, 1, 4, 3, 5])], padding=1), {"a": conv(bias=False)}, ["stem"]
    ),
    "a first row of zeros": (
        lambda m, x: F.conv2d(x, first_row_zero(m.a.weight) * 2, padding=1), {"a": conv(bias=False)}, ["stem", "a"]
    ),
    "layer without parameters": (lambda m, x: F.layer_norm(m.a(x), x.shape[1:]), {"a": conv()}, ["stem", "a"]),
    "names that graphs have": (lambda m, x: m.get_submodule("global")(x), {"global": conv()}, ["stem", "global"]),
    "multiplied by a matrix": (
        lambda m, x: torch.einsum("nchw,cd->ndhw", x, m.a.weight), {"a": nn.Linear(6, 6)}, ["stem"]
    ),
    "fast Fourier transform": (
        lambda m, x: m.a(torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=(8, 8))), {"a": conv()}, ["stem", "a"]
    ),
    "transposed convolution": (lambda m, x: m.a(x), {"a": nn.ConvTranspose2d(6, 6, 3)}, ["stem"]),
}  # fmt: skip


@pytest.mark.parametrize("idiom", IDIOMS)
def test_idioms(idiom):
    middle, layers, expected = IDIOMS[idiom]
    network = net(middle, **layers)
    with torch.no_grad():
        before = network(IMAGES)
    neurons = check_masks(network, IMAGES)
    assert [layer.name for layer in neurons.layers] == expected
    with torch.no_grad():
        assert torch.equal(network(IMAGES), before)


def test_old_weight_normalisation_also_after_a_pass_that_learned():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = net(lambda m, x: m.a(x), a=old_weight_norm(conv()))
    network.train()
    network(IMAGES).sum().backward()
    assert [layer.name for layer in check_masks(network.eval(), IMAGES).layers] == ["stem", "a"]


def test_einops():
    einops = pytest.importorskip("einops")
    network = net(
        lambda m, x: einops.rearrange(m.a(einops.rearrange(x, "n c h w -> n (h w) c")), "n (h w) c -> n c h w", h=8),
        a=nn.Linear(6, 6),
    )
    assert [layer.name for layer in check_masks(network, IMAGES).layers] == ["stem", "a"]


def test_batch_normalisation_by_the_batch_is_passed_over_and_said():
    network = net(lambda m, x: F.relu(m.n(m.a(x))), a=conv(), n=nn.BatchNorm2d(6, track_running_stats=False))
    neurons = find_neurons(network, IMAGES)
    assert [layer.name for layer in neurons.layers] == ["stem", "a"]
    assert any("running statistics" in note for note in neurons.notes)


def test_tensors_that_are_no_buffers():
    network = net(lambda m, x: m.a(x) * m.plain)
    network.plain, network.a = torch.rand(6, 1, 1), conv()
    check_masks(network, IMAGES)


@pytest.mark.parametrize(
    ("middle", "words"),
    [
        (lambda m, x: x if x.max() > 0 else -x, "values of tensors"),
        (lambda m, x: x * float(x.mean()), "values of tensors"),
        (lambda m, x: torch.stack([image * 2 for image in x]), "how many images"),
        (lambda m, x: x - x.mean(0, keepdim=True), "how many images"),
        (lambda m, x: x * torch.rand(()), "other answers each time"),
        (lambda m, x: x + torch.from_numpy(x.detach().numpy() * 2), "tensors to numpy"),
        (lambda m, x: x if (x > 9).nonzero().shape[0] == 0 else -x, "selection by values"),
        (lambda m, x: x if len(x[x > 9]) == 0 else -x, "selection by values"),
        (lambda m, x: x if not torch.is_nonzero((x > 9).sum()) else -x, "values of tensors"),
        (lambda m, x: (lambda y: y.view(len(y), -1).clamp_(-9, 9) is None or y.add_(1))(x * 1), "another view"),
        (lambda m, x: (lambda y: y.view(len(y), -1).clamp_(-9, 9) is None or y)(x * 1), "another view"),
    ],
)
def test_what_would_be_wrong_for_other_images_is_refused(middle, words):
    with pytest.raises(UntraceableError, match=words):
        find_neurons(net(middle), IMAGES)


def test_functions_of_torchscript_are_named_and_torchscript_refused():
    @torch.jit.script
    def scripted(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with pytest.raises(UntraceableError, match="TorchScript"):
        find_neurons(net(lambda m, x: scripted(x)), IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net(lambda m, x: x), IMAGES[:2])
    with pytest.raises(UntraceableError, match="Python module"):
        find_neurons(traced, IMAGES)
    with pytest.raises(DataError, match="TorchScript"):
        InfectedModel.from_module(traced, clean=(IMAGES, LABELS))


def test_every_layer_with_weights_is_accounted_for():
    network = net(with_cell, lstm=nn.LSTM(6, 6, batch_first=True))
    accounts = {account.name: account for account in find_neurons(network, IMAGES).accounts}
    assert (accounts["stem"].units, accounts["stem"].reason) == (6, None)
    assert accounts["head"].is_output
    assert accounts["lstm.weight_ih_l0"].units == 0
    assert "lstm" in accounts["lstm.weight_ih_l0"].reason
    assert find_neurons(network, IMAGES).coverage == pytest.approx(6 / 54)


def test_weights_of_a_matrix_product_are_accounted_for():
    network = net(lambda m, x: (x.flatten(2).mT @ m.matrix).mT, a=conv())
    network.matrix = nn.Parameter(torch.rand(6, 6))
    neurons = find_neurons(network, IMAGES)
    accounts = {account.name: account for account in neurons.accounts}
    assert (accounts["matrix"].channels, accounts["matrix"].units) == (6, 0)
    assert neurons.coverage == 0.5
    assert any("No recorded pass reads the weights of a." in note for note in neurons.notes)


def test_layers_that_are_made_at_the_first_call_are_asked_for():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.LazyConv2d(4, 3), nn.LazyLinear(3)

        def forward(self, x):
            return self.linear(self.conv(x).flatten(1))

    with pytest.raises(UntraceableError, match="call it once"):
        find_neurons(Lazy(), IMAGES)
    with pytest.raises(DataError, match="call it once"):
        InfectedModel.from_module(Lazy(), clean=(IMAGES, LABELS))
    with pytest.raises(DataError, match=r"torch\.nn\.Module, not the class Lazy"):
        InfectedModel.from_module(Lazy, clean=(IMAGES, LABELS))


def test_attributes_that_cannot_be_copied_are_shared():
    import threading

    network = net(lambda m, x: m.a(x), a=conv())
    network.lock, network.kept = threading.Lock(), []
    network.a.register_forward_hook(lambda module, _, out: network.kept.append(out))
    network(IMAGES)  # keeps activations with their graph
    result = repair(InfectedModel.from_module(network, clean=(IMAGES, LABELS)), policy="clp", u=1.0)
    result.compact()
    assert [layer.name for layer in result.neurons.layers] == ["stem", "a"]


def test_a_head_is_pruned_with_its_queries_keys_and_values():
    network = net(lambda m, x: m.w(x), w=Windows())
    neurons = find_neurons(network, IMAGES)
    layer = next(layer for layer in neurons.layers if layer.name == "w.qkv")
    assert layer.size == 2
    mask = np.ones(len(neurons), dtype=bool)
    mask[layer.start + 1] = False

    weight = write_mask(network, neurons, mask).w.qkv.weight
    gone = [row for row in range(18) if not weight[row].any()]
    assert gone == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    assert neurons.coverage == 1


class Answering(nn.Module):
    def __init__(self, network, form):
        super().__init__()
        self.network, self.form = network, form

    def forward(self, x):
        return self.form(self.network(x))


class Output:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    "form",
    [
        lambda logits: Output(logits),
        lambda logits: {"loss": None, "logits": logits},
        lambda logits: {"features": logits[:, :, None], "classes": logits},
        lambda logits: (logits, [logits]),
        lambda logits: [logits[..., None, None], logits],
        lambda logits: (logits.repeat(1, 4), logits),
        lambda logits: logits[..., None, None],
    ],
)
def test_answers_of_several_parts(form):
    inner = net(lambda m, x: m.n(m.a(x)), a=conv(), n=nn.BatchNorm2d(6))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        infected = InfectedModel.from_module(Answering(inner, form), clean=(IMAGES, LABELS))
    assert infected.num_classes == 3
    said = sum("The logits are taken from entry" in str(warning.message) for warning in told)
    assert said == ("logits" in infected.facts)
    result = repair(infected, policy="clp", u=1.0)
    with torch.no_grad():
        torch.testing.assert_close(infected.network(IMAGES), inner(IMAGES))
    assert isinstance(result.module, Answering)
    assert result.pruned


def test_answers_without_logits_are_refused():
    for form in (lambda logits: {"a": logits[0]}, lambda logits: "cat"):
        with pytest.raises(DataError, match="logits"):
            InfectedModel.from_module(Answering(net(lambda m, x: x), form), clean=(IMAGES, LABELS))


def test_wrappers_are_taken_off():
    inner = net(lambda m, x: m.a(x), a=conv())
    for wrapped in (
        nn.DataParallel(inner),
        torch.compile(inner, backend="eager"),
        torch.optim.swa_utils.AveragedModel(inner),
    ):
        assert type(InfectedModel.from_module(wrapped, clean=(IMAGES, LABELS)).network) is Net

    class LightningModule(nn.Module):
        pass

    class Mine(LightningModule):
        def __init__(self, **parts):
            super().__init__()
            for name, part in parts.items():
                self.add_module(name, part)

    assert unwrapped(Mine(model=inner, loss=nn.CrossEntropyLoss())) is inner
    with pytest.raises(DataError, match="the part that is the classifier"):
        unwrapped(Mine(a=inner, b=nn.Linear(2, 2)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "norm", [old_weight_norm, old_spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_norms_of_weights_are_taken_off_as_the_report_says(norm, tmp_path):
    def made():
        return nn.Sequential(conv(3), nn.ReLU(), norm(conv()), nn.ReLU(), nn.Flatten(), nn.Linear(384, 3)).eval()

    result = repair(InfectedModel.from_module(made(), clean=(IMAGES, LABELS)), policy="clp", u=0.5)
    result.save(tmp_path)
    network = made()
    with pytest.raises(RuntimeError):
        network.load_state_dict(result.module.state_dict())
    code = _loading(result, "repaired.safetensors")
    assert result.norms_off in code
    code = code.replace("Sequential(...)", "given()").replace("repaired.s", f"{tmp_path}/repaired.s")
    variables = {"given": made}
    exec(code, variables)  # what the page tells the user to write
    with torch.no_grad():
        torch.testing.assert_close(variables["network"](IMAGES), result.module(IMAGES))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_computed_in_float32_and_written_back(dtype):
    module = net(lambda m, x: m.n(m.a(x)), a=conv(), n=nn.BatchNorm2d(6)).to(dtype)
    result = repair(InfectedModel.from_module(module, clean=(IMAGES, LABELS)), policy="clp", u=0.5)
    assert module.stem.weight.dtype == dtype
    assert {value.dtype for value in result.module.parameters()} == {dtype}
    assert result.pruned
    for name, value in result.module.state_dict().items():
        changed = value != module.state_dict()[name]
        assert not value[changed].any()  # but for the zeros everything is bit for bit as it was


class Strict(nn.Module):
    """Runs only on what its author gave it: contiguous float32 images, more than one of them."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = conv(3), nn.BatchNorm2d(6), nn.Linear(384, 3)

    def forward(self, x):
        assert x.is_contiguous()
        assert x.dtype == torch.float32
        assert len(x) > 1
        return self.linear(F.relu(self.norm(self.conv(x))).view(x.size(0), -1))


@pytest.mark.parametrize("policy", ["onp", "clp", "bnp", "ep", "rnp", "fine-pruning", "magnitude", "greedy", "random"])
def test_a_module_is_run_as_its_author_runs_it(policy):
    torch.manual_seed(0)
    module = Strict().eval()
    with torch.no_grad():
        before = module(IMAGES)
    infected = InfectedModel.from_module(module, clean=(IMAGES, LABELS), test=(IMAGES[:11], LABELS[:11]))
    result = repair(infected, policy=policy, max_steps=3)
    result.compact()(IMAGES)
    with torch.no_grad():
        assert torch.equal(module(IMAGES), before)


def test_clp_needs_no_images():
    network = net(lambda m, x: nn.ReLU()(m.n(m.a(x)) + x), a=conv(), n=nn.BatchNorm2d(6))
    alone, shown = clp.prune(network, u=1.0), clp.prune(network, u=1.0, clean=(IMAGES, LABELS))
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), shown.parameters(), strict=True))

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4 * 91 * 91, 3)

        def forward(self, x):
            return self.linear(self.conv(x).flatten(1))

    with pytest.raises(UntraceableError, match=r"clean=.*--image-size"):
        clp.prune(Odd())


def test_tokens_that_stand_among_the_images_are_normalised_as_positions():
    def middle(m, x):
        return m.n(m.a(x.flatten(2).mT).flatten(0, 1)).view(len(x), 64, 6).mT

    network = net(middle, a=nn.Linear(6, 6), n=nn.BatchNorm1d(6))
    result = repair(InfectedModel.from_module(network, clean=(IMAGES, LABELS)), policy="onp", max_steps=2)
    layer = next(layer for layer in result.neurons.layers if layer.name == "a")
    assert layer.normalised
    assert np.isfinite(result.features).all()


def squeezed_and_added(m, x):
    y = m.a(x)
    return y * torch.sigmoid(m.g(F.relu(m.f(y.mean((2, 3), keepdim=True))))) + m.s(x)


@pytest.mark.parametrize("layer", ["g", "s", "a"])
def test_a_cut_of_nothing_says_why(layer):
    layers = {"a": conv(), "s": nn.Conv2d(6, 6, 1), "f": nn.Conv2d(6, 6, 1), "g": nn.Conv2d(6, 6, 1)}
    network = net(squeezed_and_added, **layers)
    neurons = find_neurons(network, IMAGES)
    mask = np.ones(len(neurons), dtype=bool)
    first = next(part.start for part in neurons.layers if part.name == layer)
    mask[first : first + 2] = False
    cut = cut_channels(network, neurons, mask, IMAGES)
    before, after = (sum(value.numel() for value in part.parameters()) for part in (network, cut.network))
    assert before > after or any(layer in stop for stop in cut.stops)


def test_a_cut_that_groups_of_a_convolution_stop_is_said():
    network = net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(groups=2))
    neurons = find_neurons(network, IMAGES)
    mask = np.ones(len(neurons), dtype=bool)
    mask[[6, 7]] = False
    cut = cut_channels(network, neurons, mask, IMAGES)
    reason = "b is a convolution in groups, and each has to lose as many"
    assert cut.stops == (f"2 pruned channels of a could not be cut out: {reason}",)


def test_layers_whose_weights_are_computed_are_not_taken_for_one_layer():
    def middle(m, x):
        x = F.relu(F.conv2d(F.relu(m.a(x)), m.b * 1 + 1, padding=1))
        return F.conv2d(x, m.c * 1 + 1, padding=1)

    network = net(middle, a=conv())
    network.b, network.c = (nn.Parameter(torch.rand(6, 6, 3, 3)) for _ in "bc")
    neurons = find_neurons(network, IMAGES)
    mask = np.ones(len(neurons), dtype=bool)
    mask[[6, 7]] = False
    cut = cut_channels(network, neurons, mask, IMAGES)
    assert cut.stops == ()
    assert (cut.network.a.out_channels, cut.network.b.shape[1]) == (4, 4)
    torch.testing.assert_close(cut.network(IMAGES), write_mask(network, neurons, mask)(IMAGES), rtol=1e-4, atol=1e-4)


class ResponseNormalised(nn.Module):
    """A ConvNeXtV2's block: channels are divided by the mean over them, and a bias is added."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Linear(4, 3)
        self.scale, self.shift = nn.Parameter(torch.rand(1, 6, 1, 1)), nn.Parameter(torch.rand(1, 6, 1, 1))

    def forward(self, images):
        hidden = torch.relu(self.a(images))
        response = hidden.norm(dim=(2, 3), keepdim=True)
        hidden = self.scale * (hidden * (response / (response.mean(1, keepdim=True) + 1e-6))) + self.shift + hidden
        return self.head(self.b(hidden).mean((2, 3)))


def test_what_holds_pruned_channels_is_told_though_their_readers_get_more_than_zeros():
    torch.manual_seed(0)
    images, network = torch.rand(3, 3, 8, 8), ResponseNormalised().eval()
    neurons = find_neurons(network, images)
    mask = np.ones(len(neurons), dtype=bool)
    first = next(layer for layer in neurons.layers if layer.name == "a")
    mask[[first.start, first.start + 1]] = False
    cut = cut_channels(network, neurons, mask, images)
    assert torch.allclose(cut.network(images), write_mask(network, neurons, mask)(images))
    assert len(cut.stops) == 1
    assert cut.stops[0].startswith("2 pruned channels of a could not be cut out: ")
    assert "works on all of them together" in cut.stops[0]
    assert cut.network.a.out_channels == 6
