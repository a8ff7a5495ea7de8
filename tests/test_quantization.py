"""INT8 linears against exact integers, and engines that run on them with adapters beside."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from held_out import held_out_texts, judge
from native_operations import compute, lay_out
from parity import Oracle
from tiny_models import FAMILIES, VOCAB, Engine, make_adapter, make_model, make_prompt, projections, use
from torch import nn

from openlora.engine import quantization
from openlora.engine.adapter_block import LoraPair, Member
from openlora.engine.kernels import kernels_for
from openlora.engine.lora import NativeLora, Segment, TorchLora, WeightedAdapter
from openlora.engine.quantization import Int8Linear, TorchaoLinear, kept_file, pack_int8, quantize
from openlora.errors import UnsupportedModel

QUANTIZED = ("int8", "int8-weight-only")


def make_linears(mode: str, features: int, channels: list[int], dtype: torch.dtype, bias: bool = True) -> nn.ModuleList:
    torch.manual_seed(features)
    linears = nn.ModuleList(nn.Linear(features, count, bias=bias, dtype=dtype) for count in channels)
    linears.requires_grad_(False)
    quantize(linears, mode)
    return linears


def pack(linears: nn.ModuleList) -> Int8Linear:
    native = kernels_for(linears[0].weight.dtype, torch.device("cpu"))
    assert native is not None, "there is no native library to test"
    return pack_int8(linears, native)


def reference(linears: nn.ModuleList, inputs: torch.Tensor, mode: str) -> torch.Tensor:
    """The formula at the head of kernels/int8_linear.h; the sums are exact in float64."""
    weight = torch.cat([linear.weight.qdata for linear in linears])
    weight_scale = torch.cat([linear.weight.scale for linear in linears]).flatten()
    largest = 127 if mode == "int8" else 32639
    scale = inputs.float().abs().amax(dim=-1, keepdim=True) / largest
    integers = (inputs.float() * (1 / scale)).round()
    outputs = (integers.double() @ weight.double().T).float() * (scale * weight_scale)
    if linears[0].bias is not None:
        outputs += torch.cat([linear.bias for linear in linears]).float()
    return outputs.to(inputs.dtype)


@pytest.mark.parametrize("mode", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("features", "channels"), [(64, [32]), (256, [64, 16, 16]), (30, [7]), (67, [33, 1]), (5, [100])]
)
def test_the_kernel_is_exact(mode, dtype, features, channels):
    """Whatever the shape: features that fill no group, channels that fill no panel, one row to several blocks."""
    linears = make_linears(mode, features, channels, dtype, bias=features != 64)
    packed = pack(linears)
    for rows in (0, 1, 3, 8, 9, 21):
        inputs = torch.randn(rows, features, dtype=dtype)
        expected = reference(linears, inputs, mode)
        torch.testing.assert_close(packed(inputs), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", QUANTIZED)
def test_inputs_of_any_layout(mode):
    linears = make_linears(mode, 32, [40], torch.float32)
    packed = pack(linears)
    wide = torch.randn(2, 5, 64)
    expected = reference(linears, wide[..., :32].contiguous(), mode)
    assert torch.equal(packed(wide[..., :32]), packed(wide[..., :32].contiguous()))
    torch.testing.assert_close(packed(wide[..., :32]), expected, rtol=1e-5, atol=1e-5)
    columns = wide[0, :, :32].T.contiguous().T  # rows that lie apart
    assert torch.equal(packed(columns), packed(columns.contiguous()))


@pytest.mark.parametrize("mode", QUANTIZED)
def test_a_row_depends_on_no_other_and_on_no_thread(mode):
    linears = make_linears(mode, 100, [70], torch.float32)
    packed = pack(linears)
    inputs = torch.randn(23, 100) * torch.logspace(-6, 6, 23)[:, None]
    together = packed(inputs)
    for row in range(len(inputs)):
        assert torch.equal(packed(inputs[row : row + 1])[0], together[row])
    packed._kernels.threads = 3
    assert torch.equal(packed(inputs), together)


@pytest.mark.parametrize("mode", QUANTIZED)
@pytest.mark.parametrize("rows", [1, 23, 500])
def test_adapters_beside_are_what_is_added_to_the_result(mode, rows):
    """In 16-bit products over the inputs as they came; in more rows than are made integers at once, too."""
    members = [Member("one", 0, 40), Member("two", 40, 30)]
    linears = make_linears(mode, 100, [40, 30], torch.float32)
    packed = pack(linears)
    packed._kernels.threads = 3
    inputs, outputs = torch.randn(rows, 100), torch.empty(rows, 70)
    pairs = {member.name: LoraPair(torch.randn(5, 100), torch.randn(member.columns, 5), 0.5) for member in members}
    native, plain = NativeLora([members]), TorchLora([members])
    expected = packed(inputs)
    for lora in (native, plain):
        half = rows // 2
        use = WeightedAdapter(lay_out(lora, "a", pairs), 0.7)
        lora.begin([Segment(use, 0, half), Segment(WeightedAdapter(use.adapter, -1.1), half, rows)])
    plain.add(0, inputs[None], expected[None])
    operation = packed.operation.copy()
    operation["group"] = 0
    compute(packed._kernels, operation, [inputs, outputs], lora=native, quantized_bytes=packed.quantized_bytes)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", QUANTIZED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 33])
def test_a_row_that_is_not_finite_stays_alone(mode, bad, place):
    packed = pack(make_linears(mode, 34, [40], torch.float32))
    inputs = torch.randn(3, 34)
    clean = packed(inputs)
    inputs[1, place] = bad
    found = packed(inputs)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_zeros_and_tiny_rows():
    packed = pack(make_linears("int8", 32, [32], torch.float32, bias=False))
    inputs = torch.randn(1, 32)
    assert torch.equal(packed(torch.zeros(2, 32)), torch.zeros(2, 32))
    torch.testing.assert_close(packed(inputs * 2**-60), packed(inputs) * 2**-60, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", QUANTIZED)
def test_torchao_computes_the_same(mode, dtype):
    """What runs on a GPU, and in float16: of several linears at once, as of each alone, and as the kernel's formula."""
    linears = make_linears(mode, 64, [32, 7], dtype)
    inputs = torch.randn(9, 64, dtype=dtype)
    joint = TorchaoLinear(linears)(inputs)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(
        joint, torch.cat([linear(inputs) for linear in linears], 1), rtol=rounding, atol=rounding
    )
    steps = inputs.float().abs().amax() / 127 * math.sqrt(64) * 0.1  # half a step each way in 64 inputs, weights ≤ 1/8
    torch.testing.assert_close(joint, reference(linears, inputs, mode), rtol=rounding, atol=steps.item())


def test_without_a_kernel_torchao_runs_and_the_log_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        linears = make_linears("int8", 16, [16], torch.float16)
    assert isinstance(pack_int8(linears, None), TorchaoLinear)
    assert "int8 has no native kernel here (torch.float16)" in caplog.text


def test_weights_are_quantized_once(tmp_path, caplog):
    """The second start reads what the first one made, in either mode; a damaged file is made anew."""
    kept = kept_file(tmp_path / "quantized", "ab" * 32, torch.float32)

    def start(mode: str) -> nn.ModuleList:
        torch.manual_seed(0)
        linears = nn.ModuleList([nn.Linear(24, 40), nn.Linear(40, 8)]).requires_grad_(False)
        caplog.clear()
        with caplog.at_level(logging.INFO, quantization.__name__):
            quantize(linears, mode, kept)
        return linears

    inputs = torch.randn(4, 24)
    first = start("int8")
    assert "made by torchao" in caplog.text
    second = start("int8")
    assert "read from" in caplog.text
    assert torch.equal(pack([first[0]])(inputs), pack([second[0]])(inputs))
    assert torch.equal(first[0](inputs), second[0](inputs))
    assert torch.equal(first[1].weight.qdata, start("int8-weight-only")[1].weight.qdata)
    assert "read from" in caplog.text
    content = kept.read_bytes()
    kept.write_bytes(content[:-9])
    assert torch.equal(first[1].weight.qdata, start("int8")[1].weight.qdata)
    assert "quantized anew" in caplog.text
    assert kept.read_bytes() == content
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_the_kept_weights_of_another_model_are_not_taken(tmp_path, caplog):
    kept = kept_file(tmp_path, "ab" * 32, torch.float32)
    quantize(nn.ModuleList([nn.Linear(8, 8)]), "int8", kept)
    other = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)])
    quantize(other, "int8", kept)
    assert "quantized anew" in caplog.text
    assert [tuple(linear.weight.qdata.shape) for linear in other] == [(16, 8), (8, 16)]


def test_more_inputs_than_a_sum_can_hold_are_refused():
    with pytest.raises(UnsupportedModel, match="0 has 131072 inputs, int8 takes at most 131071"):
        quantize(nn.ModuleList([nn.Linear(131072, 1, bias=False)]), "int8")


# Engines


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(model directory, adapter directories, an oracle whose base weights are the quantized ones, in float32)."""
    directory = tmp_path_factory.mktemp(request.param)
    model_dir = make_model(directory / "model", request.param)
    names = projections(request.param)
    adapters = {
        "all": make_adapter(model_dir, directory / "all", 1, r=4, lora_alpha=6, target_modules=names),
        "some": make_adapter(
            model_dir, directory / "some", 2, r=9, lora_alpha=3, target_modules=[names[0], "down_proj"]
        ),
    }
    return model_dir, adapters, dequantized_oracle(model_dir, adapters)


def dequantized_oracle(model_dir: str, adapters: dict[str, str]) -> Oracle:
    oracle = Oracle(model_dir, {})
    quantize(oracle.base, "int8-weight-only")
    for module in oracle.base.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.qdata.float() * module.weight.scale, requires_grad=False)
    peft = Oracle(model_dir, adapters)
    weights = dict(oracle.base.named_parameters())
    for name, parameter in peft.peft.base_model.model.named_parameters():
        if "lora_" not in name:
            parameter.data = weights[name.replace(".base_layer", "")].data
    # A tied output layer has weights of its own once it is quantized.
    peft.peft.base_model.model.get_output_embeddings().weight = oracle.base.get_output_embeddings().weight
    return peft


MIXES = [(), (("all", 1.0),), (("some", -0.5),), (("all", 0.6), ("some", 0.4))]


def ask_all(engine: Engine, adapters: dict[str, str], order: list[int], prefix: str) -> dict:
    """Every prompt with every mix, all at once; the answers in the order of the cases."""
    cases = [(make_prompt(seed, length), mix) for seed, length in enumerate((5, 17, 40)) for mix in MIXES]
    for index in order:
        prompt, mix = cases[index]
        uses = [use(adapters[name], weight) for name, weight in mix]
        engine.submit(f"{prefix} {index}", prompt, uses, max_tokens=8, logprobs=VOCAB)
    return {cases[index]: engine.wait(f"{prefix} {index}") for index in sorted(order)}


@pytest.mark.parametrize(("mode", "bound"), [("int8", 0.07), ("int8-weight-only", 5e-4)])
def test_engines_answer_as_the_quantized_model_does(family, mode, bound):
    """Adapters mixed in one batch: log-probabilities of the whole vocabulary along each answer, against PEFT over the
    same weights with exact activations. The bound is relative, as one vector; what int8 has in it is its activations.
    """
    model_dir, adapters, oracle = family
    with Engine(model_dir, quantization=mode, max_step_tokens=64) as engine:
        answers = ask_all(engine, adapters, list(range(12)), "all")
        assert engine.engine.info.quantization == mode
    for (prompt, mix), answer in answers.items():
        logits = oracle.logits([*prompt, *answer.ids[:-1]], mix)[len(prompt) - 1 :]
        expected = logits.log_softmax(dim=-1)
        found = torch.zeros_like(expected)
        for position, chosen in enumerate(answer.logprobs):
            for token, logprob in ((chosen.token_id, chosen.logprob), *chosen.top):
                found[position, token] = logprob
        assert (found != 0).all(), "a token without its probability"
        assert (found - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("mode", QUANTIZED)
def test_neighbours_and_order_change_nothing(family, mode):
    model_dir, adapters, _ = family
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    with Engine(model_dir, quantization=mode, prefix_cache=False) as engine:
        together = ask_all(engine, adapters, list(range(12)), "together")
        for answers in (
            ask_all(engine, adapters, shuffled, "shuffled"),
            *(ask_all(engine, adapters, [index], f"alone {index}") for index in (1, 6, 11)),
        ):
            for case, answer in answers.items():
                assert answer.ids == together[case].ids
                ours = torch.tensor([chosen.logprob for chosen in answer.logprobs])
                theirs = torch.tensor([chosen.logprob for chosen in together[case].logprobs])
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", QUANTIZED)
def test_the_check_at_start_notices_wrong_weights(tmp_path, monkeypatch, mode):
    model_dir = make_model(tmp_path / "model")
    right = quantization.pack_bytes
    monkeypatch.setattr(quantization, "pack_bytes", lambda weight: right(weight.flip(0)))
    with pytest.raises(UnsupportedModel, match="self-check failed"):
        Engine(model_dir, quantization=mode)


def test_quantized_weights_are_kept_for_the_next_start(tmp_path):
    model_dir = make_model(tmp_path / "model")
    answers = []
    for _ in range(2):
        with Engine(model_dir, quantization="int8", quantized_dir=str(tmp_path / "kept")) as engine:
            answers.append(engine.ask(make_prompt(1, 9)).ids)
        (file,) = (tmp_path / "kept").iterdir()
        assert file.name.startswith("0" * 64 + "-float32-torchao-")
    assert answers[0] == answers[1]


def test_perplexity_of_the_demos_held_out_text_stays_within_a_percent(demo):
    texts = held_out_texts(demo)
    for dtype in ("float32", "bfloat16"):
        plain = judge(str(demo / "model"), dtype, "none", texts)
        for mode in QUANTIZED:
            found = judge(str(demo / "model"), dtype, mode, texts)
            assert found.answers == pytest.approx(plain.answers, rel=0.01)
            assert found.everything == pytest.approx(plain.everything, rel=0.01)
            assert found.agreement(plain) > 0.99
