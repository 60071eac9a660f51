from __future__ import annotations

import pytest
import torch
from tests import families
from tests.estimation.tiny import OwnModel
from tests.families import build, token_ids
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma4TextConfig

from saap.core.errors import UnsupportedModelError
from saap.discovery.blocks import find_blocks
from saap.models.structure.linear import contracted_axis, linear_modules, owner, weight_out_in
from saap.models.walk.walker import BlockWalker, inference_only
from saap.pipeline.shared.legality import check_walk


def walked(walker: BlockWalker, tokens: Tensor) -> Tensor:
    stream = walker.start(tokens)
    hidden = stream.hidden
    for index in range(len(walker.blocks)):
        hidden = walker.run_block(index, hidden, stream.contexts)
    return walker.logits(hidden)


def stock(model: nn.Module, tokens: Tensor) -> Tensor:
    out = model(tokens)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("family", families.FAMILIES)
def test_blocks_one_by_one_give_the_stock_logits(family: str) -> None:
    model, tokens = build(family), token_ids(3, 12)
    expected = stock(model, tokens)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    walker = BlockWalker(model, find_blocks(model))
    assert torch.equal(walked(walker, tokens), expected)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert not module._forward_pre_hooks
    assert torch.equal(stock(model, tokens), expected)


@pytest.mark.parametrize("family", families.CORE)
def test_logits_of_a_slice_of_the_tokens(family: str) -> None:
    model, tokens = build(family), token_ids(2, 12)
    walker = BlockWalker(model, find_blocks(model))
    stream = walker.start(tokens)
    whole = walker.logits(stream.hidden)
    torch.testing.assert_close(walker.logits(stream.hidden[1:, 5:9]), whole[1:, 5:9], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", families.CORE)
def test_gradients_block_by_block_equal_those_of_the_whole(family: str) -> None:
    model, tokens = build(family), token_ids(2, 12)
    walker = BlockWalker(model, find_blocks(model))
    stream = walker.start(tokens)
    inputs = [stream.hidden.clone().requires_grad_(True)]
    for index in range(len(walker.blocks)):
        inputs.append(walker.run_block(index, inputs[-1], stream.contexts))
    last = inputs[-1].detach().requires_grad_(True)
    walker.logits(last).logsumexp(-1).sum().backward()
    whole = torch.autograd.grad(walker.logits(inputs[-1]).logsumexp(-1).sum(), inputs[0])[0]
    gradient = last.grad
    for index in reversed(range(len(walker.blocks))):
        gradient, _ = walker.backward_to_weights(index, inputs[index], stream.contexts, gradient, {})
    torch.testing.assert_close(gradient, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("returns_tuple", [False, True])
def test_own_model_with_keyword_hidden_states(returns_tuple: bool) -> None:
    model, tokens = OwnModel(returns_tuple), token_ids(2, 7)
    assert torch.equal(walked(BlockWalker(model, find_blocks(model)), tokens), model(tokens))


@torch.no_grad()
def test_a_model_that_returns_its_routing_by_default_is_walked() -> None:
    model, tokens = build("mixtral"), token_ids(1, 6)
    expected = model(tokens).logits
    model.config.output_router_logits = True
    torch.testing.assert_close(walked(BlockWalker(model, find_blocks(model)), tokens), expected, rtol=0, atol=0)


def test_hooks_of_others_run_once_per_block() -> None:
    model, tokens = build("llama"), token_ids(1, 6)
    model.model.layers[-1].register_forward_pre_hook(lambda module, arguments: (2 * arguments[0], *arguments[1:]))
    expected = stock(model, tokens)
    assert torch.equal(walked(BlockWalker(model, find_blocks(model)), tokens), expected)


def test_forward_replaced_on_the_block_itself_is_kept() -> None:
    model, tokens = OwnModel(), token_ids(1, 6)
    block = model.blocks[1]
    original = block.forward
    replaced = lambda states, scale: original(states, scale=2 * scale)  # noqa: E731
    block.forward = replaced
    assert torch.equal(walked(BlockWalker(model, find_blocks(model)), tokens), model(tokens))
    assert block.forward is replaced


def test_model_is_restored_after_an_error() -> None:
    model = build("llama")
    walker = BlockWalker(model, find_blocks(model))
    with pytest.raises(IndexError):
        walker.start(torch.tensor([[10_000]]))
    assert all("forward" not in vars(block) and not block._forward_pre_hooks for block in walker.blocks)


def test_a_step_between_blocks_is_refused() -> None:
    class Between(OwnModel):
        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.embed(input_ids)
            for block in self.blocks:
                hidden = torch.tanh(block(states=hidden, scale=torch.ones(1, dtype=hidden.dtype)))
            return self.head(hidden)

    model = Between()
    with pytest.raises(UnsupportedModelError, match=r"between blocks\.0"):
        BlockWalker(model, find_blocks(model)).start(token_ids(1, 5))


def test_blocks_that_do_not_run_are_refused() -> None:
    model = OwnModel()
    model.spare = nn.ModuleList([nn.Identity()])
    with pytest.raises(UnsupportedModelError, match="3 block calls"):
        BlockWalker(model, [*find_blocks(model), "spare.0"]).start(token_ids(1, 5))


def test_blocks_that_run_twice_are_refused() -> None:
    model = OwnModel()
    model.blocks = nn.ModuleList([*model.blocks, model.blocks[0]])
    with pytest.raises(UnsupportedModelError, match="Block call 4"):
        BlockWalker(model, find_blocks(model)[:3]).start(token_ids(1, 5))


def test_keys_and_values_that_later_blocks_take_from_earlier_ones_are_refused() -> None:
    config = Gemma4TextConfig(
        vocab_size=64, hidden_size=48, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, global_head_dim=12, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = families.randomised(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    with pytest.raises(UnsupportedModelError, match="do not run one by one"):
        check_walk(model, find_blocks(model))


def test_starting_makes_the_logits_of_two_tokens_only() -> None:
    model, tokens = build("llama"), token_ids(2, 12)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, arguments, output: seen.append(output.shape[:2].numel()))
    walker = BlockWalker(model, find_blocks(model))
    walker.start(tokens)
    walker.start(tokens)
    assert seen == [2]


def test_inference_only_gives_back_each_state() -> None:
    model = OwnModel().train()
    model.blocks[0].eval()
    model.head.weight.requires_grad_(False)
    try:
        with inference_only(model):
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            raise KeyError
    except KeyError:
        pass
    assert model.training
    assert not model.blocks[0].training
    assert not model.head.weight.requires_grad
    assert model.head.bias.requires_grad


def test_linear_modules_know_their_contracted_axis() -> None:
    gpt2, llama = build("gpt2"), build("llama")
    conv = gpt2.transformer.h[0].mlp.c_fc
    assert contracted_axis(conv) == 0
    assert weight_out_in(conv).shape == (80, 48)
    assert contracted_axis(llama.model.layers[0].mlp.up_proj) == 1
    assert contracted_axis(llama.model.norm) is None
    assert "model.layers.1.mlp.down_proj" in linear_modules(llama)
    module, attribute = owner(gpt2, "transformer.h.0.mlp.c_fc.bias")
    assert module is conv
    assert attribute == "bias"
    with pytest.raises(TypeError):
        weight_out_in(llama.model.norm)
    with pytest.raises(AttributeError):
        owner(gpt2, "transformer.h.0.mlp.c_fc.nothing")
