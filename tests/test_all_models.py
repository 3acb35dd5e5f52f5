"""Properties of every model family's adapter, held against the diffusers model it wraps, on tiny random models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_flux, make_pixart, make_sd3
from diffusers import DiTTransformer2DModel, FluxPipeline
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hcompress.adapter import Adapter, compute_all, config_hash, weight_hash
from hcompress.errors import InputError, ModelError
from hcompress.models.dit import DiT
from hcompress.models.flux import Flux
from hcompress.models.sd3 import SD3


def dit(**changes: object) -> DiTTransformer2DModel:
    """Random weights, so that every block has timestep and label embeddings of its own."""
    torch.manual_seed(0)
    config = dict(num_layers=3, num_attention_heads=2, attention_head_dim=8, in_channels=4, sample_size=8)
    return DiTTransformer2DModel(**config | {"num_embeds_ada_norm": 5} | changes).eval()


def tied(network: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """All blocks with the embeddings of the first, as trained models have them."""
    first, *others = (block.norm1.emb for block in network.transformer_blocks)
    for other in others:
        other.load_state_dict(first.state_dict())
    return network


MODELS = {
    "dit": lambda: DiT(dit()),
    "dit tied": lambda: DiT(tied(dit())),
    "dit one block": lambda: DiT(dit(num_layers=1)),
    "dit learned variance": lambda: DiT(tied(dit(out_channels=8, attention_head_dim=6))),
    "dit pixels": lambda: DiT(tied(dit(in_channels=1, sample_size=12, patch_size=4, activation_fn="geglu"))),
    "dit without attention bias": lambda: DiT(tied(dit(attention_bias=False, norm_elementwise_affine=True))),
}
BRANCHES = dict.fromkeys(MODELS, ("attn", "mlp"))  # of a block
MODELS |= {
    "pixart": make_pixart,
    "pixart told its resolution": lambda: make_pixart(use_additional_conditions=True),
    "pixart without projection": lambda: make_pixart(1, caption_channels=None, cross_attention_dim=10),
    "pixart pixels": lambda: make_pixart(3, channels=1, out_channels=1, patch_size=4, activation_fn="geglu"),
    "pixart without attention bias": lambda: make_pixart(attention_bias=False, norm_elementwise_affine=True),
}
BRANCHES |= dict.fromkeys(MODELS.keys() - BRANCHES.keys(), ("attn", "cross", "mlp"))
JOINT, LAST, SINGLE = ("attn", "mlp", "context_mlp"), ("attn", "mlp"), ("single",)
MODELS |= {
    "sd3": make_sd3,
    "sd3.5 medium": lambda: make_sd3(3, qk_norm="rms_norm", dual_attention_layers=(0, 2), patch_size=4),
    "flux dev": lambda: make_flux(guidance_embeds=True),
    "flux schnell": lambda: make_flux(2),
}
OF_BLOCKS = {name: [BRANCHES[name]] * len(MODELS[name]().network.transformer_blocks) for name in BRANCHES} | {
    "sd3": [JOINT, LAST],
    "sd3.5 medium": [("attn", "attn2", "mlp", "context_mlp"), JOINT, ("attn", "attn2", "mlp")],
    "flux dev": [JOINT, SINGLE, SINGLE],
    "flux schnell": [JOINT, JOINT, SINGLE, SINGLE],
}
MODULATIONS = (".norm1.linear", ".norm1_context.linear", ".norm.linear", ".scale_shift_table")
DITS = [name for name in MODELS if name.startswith("dit")]


@pytest.fixture(params=MODELS)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return MODELS[request.param]()


@pytest.fixture(params=DITS)
def dit_adapter(request: pytest.FixtureRequest) -> Adapter:
    return MODELS[request.param]()


def inputs(adapter: Adapter, rows: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x [R, C, H, W], one timestep [R] and one condition a row."""
    torch.manual_seed(rows)
    condition = adapter.random_condition(np.random.default_rng(rows), rows)
    return torch.randn(rows, *adapter.sample_shape), torch.randint(1000, (rows,)), dict(condition)


def dense(adapter: Adapter, x: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """The diffusers model's own output."""
    if isinstance(adapter, DiT):
        return adapter.network(x, timestep=timesteps, class_labels=condition["labels"]).sample
    if isinstance(adapter, SD3):
        return adapter.network(x, condition["prompt_embeds"], condition["pooled_prompt_embeds"], timesteps).sample
    if isinstance(adapter, Flux):
        packed = FluxPipeline._pack_latents(x, *x.shape)
        ids = FluxPipeline._prepare_latent_image_ids(len(x), x.shape[2] // 2, x.shape[3] // 2, "cpu", torch.float32)
        tokens = adapter.network(
            packed,
            condition["prompt_embeds"],
            condition["pooled_prompt_embeds"],
            timesteps.to(x.dtype) / 1000,
            ids,
            torch.zeros(condition["prompt_embeds"].shape[1], 3),
            condition.get("guidance"),
        ).sample
        return FluxPipeline._unpack_latents(tokens, 8 * x.shape[2], 8 * x.shape[3], vae_scale_factor=8)
    size = torch.full((len(x), 2), 8.0 * x.shape[-1])  # pixels, eight for each of the latent's
    return adapter.network(
        x,
        timestep=timesteps,
        encoder_hidden_states=condition["prompt_embeds"],
        encoder_attention_mask=condition.get("prompt_mask"),
        added_cond_kwargs={"resolution": size, "aspect_ratio": torch.ones(len(x), 1)},
    ).sample


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_forward_is_bit_identical_to_diffusers(adapter: Adapter, rows: int) -> None:
    x, timesteps, condition = inputs(adapter, rows)
    got = adapter(x, condition, adapter.step_constants(timesteps), compute_all)
    assert torch.equal(got, dense(adapter, x, timesteps, condition))


def test_one_row_of_constants_serves_all_rows(adapter: Adapter) -> None:
    x, timesteps, condition = inputs(adapter, 4)
    one = adapter.step_constants(timesteps[:1])
    assert all(rows.shape[0] == 1 for rows in one.values())
    got = adapter(x, condition, one, compute_all)
    want = dense(adapter, x, timesteps[:1].expand(4), condition)
    # A matrix product of one row takes another path through the library than one of four: float32, eps 6e-8.
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_tied_model_computes_its_embedding_once(dit_adapter: Adapter) -> None:
    embeddings = [block.norm1.emb.state_dict() for block in dit_adapter.network.transformer_blocks]
    different = {tuple(float(tensor.double().sum()) for tensor in state.values()) for state in embeddings}
    constants = dit_adapter.step_constants(torch.tensor([3, 900]))["time_embedding"]
    assert constants.shape[:2] == (2, len(different))


def test_the_route_is_asked_for_every_branch_once_in_order_and_gets_its_slot_shape(adapter: Adapter) -> None:
    x, timesteps, condition = inputs(adapter, 2)
    asked: list[int] = []

    def route(branch: int, compute):
        output = compute()
        asked.append(branch)
        assert output.shape == (2, *adapter.graph.branches[branch].shape)
        return output

    adapter(x, condition, adapter.step_constants(timesteps), route)
    assert asked == list(range(len(adapter.graph)))


def test_a_slot_that_is_handed_back_replaces_its_branch(adapter: Adapter) -> None:
    """With what a branch gave at x, reuse at x changes nothing; with what it gave at y, it does."""
    x, timesteps, condition = inputs(adapter, 2)
    constants = adapter.step_constants(timesteps)
    want = adapter(x, condition, constants, compute_all)
    slots: dict[Tensor, dict[int, Tensor]] = {x: {}, -x: {}}
    for at, filled in slots.items():
        adapter(at, condition, constants, lambda i, compute, filled=filled: filled.setdefault(i, compute()))
    for branch in range(len(adapter.graph)):
        got = [
            adapter(x, condition, constants, lambda i, compute, filled=f, b=branch: filled[i] if i == b else compute())
            for f in slots.values()
        ]
        assert torch.equal(got[0], want)
        assert not torch.equal(got[1], want)


@pytest.mark.parametrize("rows", [1, 3])
def test_macs_are_those_that_torch_counts(adapter: Adapter, rows: int) -> None:
    """Every matrix product and convolution of a call, counted by torch while it runs: two operations a MAC.

    Not in either count: normalisation, activations, softmax, gates and additions; and the timestep MLP, which runs
    once a step for all samples and is a constant of the frozen step.
    """
    x, timesteps, condition = inputs(adapter, rows)
    constants = adapter.step_constants(timesteps)
    branches: dict[int, int] = {}

    def counted(branch: int, compute):
        with FlopCounterMode(display=False) as counter:
            output = compute()
        branches[branch] = counter.get_total_flops()
        return output

    with sdpa_kernel(SDPBackend.MATH):  # torch counts nothing in its fused attention on a CPU
        with FlopCounterMode(display=False) as total:
            adapter(x, condition, constants, compute_all)
        adapter(x, condition, constants, counted)
    graph = adapter.graph
    assert [branches[i] for i in range(len(graph))] == [2 * rows * branch.macs for branch in graph.branches]
    assert total.get_total_flops() == 2 * rows * (graph.other_macs + int(graph.macs.sum()))


def test_mac_ratio_is_dense_over_cached(adapter: Adapter) -> None:
    graph = adapter.graph
    compute = np.ones((2, len(graph)), bool)
    assert graph.mac_ratio(compute) == 1.0
    compute[1] = False
    whole = graph.other_macs + int(graph.macs.sum())
    assert graph.total_macs(compute) == whole + graph.other_macs
    assert graph.mac_ratio(compute) == 2 * whole / (whole + graph.other_macs) > 1


def test_params_are_all_of_the_network_with_equal_embedders_once(adapter: Adapter) -> None:
    graph, network = adapter.graph, adapter.network
    embedders = [b.norm1.emb.state_dict() for b in network.transformer_blocks if isinstance(adapter, DiT)]
    distinct = {tuple(float(tensor.double().sum()) for tensor in state.values()): state for state in embedders}
    sizes = [tensor.numel() for state in distinct.values() for tensor in state.values()]
    sizes += [parameter.numel() for name, parameter in network.named_parameters() if ".norm1.emb." not in name]
    assert graph.other_params + sum(branch.params for branch in graph.branches) == graph.total_params == sum(sizes)


def test_params_of_a_branch_are_those_that_stop_mattering_when_it_is_reused(adapter: Adapter) -> None:
    """A gradient reaches no parameter of a reused branch, nor the rows of adaLN that give its shift and scale.

    Those rows are of a layer in each block, or of a table. What only another branch needs counts as needed, so that a
    stream of text, which ends in the last attention, is judged branch by branch.
    """
    x, timesteps, condition = inputs(adapter, 2)
    constants = adapter.step_constants(timesteps)
    parameters = dict(adapter.network.requires_grad_(True).named_parameters())

    def needed(reused: int | None) -> int:
        outputs = []

        def route(branch: int, compute):
            outputs.append(torch.ones(2, *adapter.graph.branches[branch].shape) if branch == reused else compute())
            return outputs[-1]

        outputs.append(adapter(x, condition, constants, route))
        loss = torch.stack([output.square().sum() for output in outputs]).sum()
        gradients = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
        found = {name: gradient for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
        count = 0
        for name, gradient in found.items():
            modulates = any(layer in name for layer in MODULATIONS)
            size = 1 if "table" in name else adapter.network.inner_dim
            parts = gradient.split(size) if modulates else [gradient]
            count += sum(part.numel() for part in parts if part.any() or not modulates)
        return count

    dense = needed(None)
    assert [dense - needed(branch) for branch in range(len(adapter.graph))] == [
        b.params for b in adapter.graph.branches
    ]


@pytest.mark.parametrize("name", MODELS)
def test_names_are_unique_and_follow_the_blocks(name: str) -> None:
    adapter = MODELS[name]()
    assert adapter.graph.names == tuple(f"{block}.{kind}" for block, of in enumerate(OF_BLOCKS[name]) for kind in of)


def test_guidance_mixes_the_guided_channels_with_the_null_condition(adapter: Adapter) -> None:
    x, timesteps, condition = inputs(adapter, 2)
    constants = adapter.step_constants(timesteps[:1])
    cond = adapter(x, condition, constants, compute_all)
    uncond = adapter(x, adapter.null_condition(condition), constants, compute_all)
    n = adapter.guided_channels
    assert n == adapter.sample_shape[0] and not torch.equal(cond, uncond)
    got = adapter.guided(x, condition, constants, 1.5)
    # Two batches of 2 against one of 4: float32 products round differently (eps 6e-8).
    tolerance = 1e-5 * cond.abs().max()
    assert (got[:, :n] - (uncond + 1.5 * (cond - uncond))[:, :n]).abs().max() <= tolerance
    assert torch.allclose(got[:, n:], cond[:, n:], rtol=0, atol=float(tolerance))
    assert torch.equal(adapter.guided(x, condition, constants, 1.0), cond)


def test_the_null_condition_is_one_past_the_last_label(dit_adapter: Adapter) -> None:
    condition = dit_adapter.label_condition([0, 4])
    assert dit_adapter.null_condition(condition)["labels"].tolist() == [5, 5]
    assert condition["labels"].tolist() == [0, 4]


@pytest.mark.parametrize("label", [-1, 5, 1000])
def test_labels_out_of_range_are_refused(dit_adapter: Adapter, label: int) -> None:
    with pytest.raises(InputError, match=rf"label {label} is outside 0\.\.4"):
        dit_adapter.label_condition([0, label])


def test_random_conditions_cover_the_classes_and_nothing_else(dit_adapter: Adapter) -> None:
    labels = dit_adapter.random_condition(np.random.default_rng(0), 200)["labels"]
    assert set(labels.tolist()) == {0, 1, 2, 3, 4}


def test_conditions_to_evaluate_with_take_turns(adapter: Adapter) -> None:
    """Every class or prompt equally often, and what is given for a row does not depend on how many there are."""
    first, more = (adapter.condition(adapter.even_conditions(count)) for count in (3, 30))
    assert all(torch.equal(first[name], more[name][:3]) for name in first)
    told = next(iter(more.values())).flatten(1) if more.keys() != {"labels"} else more["labels"][:, None]
    assert set(torch.unique(told, dim=0, return_counts=True)[1].tolist()) in ({30 // 5}, {30 // 3})


def test_the_network_is_frozen(adapter: Adapter) -> None:
    assert not adapter.network.training
    assert not any(parameter.requires_grad for parameter in adapter.parameters())


def test_identity_tells_configurations_and_weights_apart() -> None:
    assert len({config_hash(make().config()) for make in MODELS.values()}) == len(MODELS) - 1  # dit and dit tied
    assert len({weight_hash(make().network) for make in MODELS.values()}) == len(MODELS)
    for make in MODELS.values():
        assert make().identity("a", {}, 1.5) == make().identity("a", {}, 1.5)


def test_the_weight_hash_is_of_float32_values() -> None:
    network = dit()
    before = weight_hash(network)
    assert weight_hash(network.to(torch.float64)) == before
    with torch.no_grad():
        network.proj_out_2.bias[0] += 1e-3
    assert weight_hash(network) != before


def test_another_normalisation_has_no_adapter() -> None:
    network = dit()
    network.register_to_config(norm_type="layer_norm")
    with pytest.raises(ModelError, match="'layer_norm' has no adapter; only 'ada_norm_zero'"):
        DiT(network)
