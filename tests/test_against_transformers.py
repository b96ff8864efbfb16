"""octavo computes what transformers' `MinistralForCausalLM` computes, in both published formats.

Models are small and random; the attention is transformers' eager one. fp32 logits have a standard
deviation of about 1, so that a wrong mask, order of rows or position moves them by tenths, and
rounding by millionths.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.ministral import modeling_ministral

from octavo import Transformer, generate
from octavo.config import ModelConfig
from tests.checkpoints import (
    State,
    Window,
    hugging_face_fields,
    hugging_face_state,
    interleaved,
    random_state,
    small_config,
    write_hugging_face,
    write_mistral,
)

FP32_ROUNDING = 2e-5  # of logits with a standard deviation of 1; 4e-6 was seen at 61 tokens
PATTERNS: list[tuple[Window, ...]] = [
    (None,),
    (16,),
    (None, 8, 8, 8),
    (4, None),
    (None, 5),
    (8, 8, 8, None),
    (1, None),
]
LENGTH = 61  # several windows, and a multiple of none


def tokens(config: ModelConfig, length: int = LENGTH, seed: int = 1) -> Tensor:
    """[length] random ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (length,), generator=generator)


def reference(
    config: ModelConfig, state: State, model_type: str = "ministral", dtype: Any = torch.float32
) -> Any:
    """transformers' model with these weights; every tensor must find its place."""
    fields = hugging_face_fields(config, model_type)
    hf_config = transformers.AutoConfig.for_model(**fields)
    assert hf_config.rope_parameters["rope_theta"] == config.rope_theta
    model = transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager")
    tensors = hugging_face_state(state)
    if config.tied_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    return model.to(dtype).eval().requires_grad_(False)


def reference_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """[T] ids to [T, vocab] logits in fp32, one plain pass without a cache."""
    return model(ids[None], use_cache=False).logits[0].float()


def assert_same(actual: Tensor, expected: Tensor, atol: float = FP32_ROUNDING) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=atol)


def write(layout: str, folder: Path, config: ModelConfig, state: State, **options: Any) -> Path:
    """The state in the layout of this name."""
    if layout == "mistral format":
        return write_mistral(folder, config, state, **options)
    return write_hugging_face(folder, config, state, **options)


def in_chunks(
    model: Transformer, ids: Tensor, chunk_size: int, capacity: int | None = None
) -> Tensor:
    """Logits of every token, fed to one cache `chunk_size` at a time."""
    cache = model.new_cache(capacity or len(ids))
    rows = [model(chunk, [len(chunk)], [cache]) for chunk in ids.split(chunk_size)]
    return torch.cat(rows)


layouts = pytest.mark.parametrize("layout", ["mistral format", "hugging face format"])
patterns = pytest.mark.parametrize("windows", PATTERNS, ids=str)


@layouts
@patterns
def test_logits_with_each_pattern(tmp_path: Path, windows: tuple[Window, ...], layout: str) -> None:
    config = small_config(windows)
    state = random_state(config)
    ids = tokens(config)
    model = Transformer.from_folder(write(layout, tmp_path, config, state))
    assert model.config.windows == config.windows
    expected = reference_logits(reference(config, state), ids)
    assert_same(model(ids, [len(ids)]), expected)


def test_patterns_with_windows_of_several_sizes(tmp_path: Path) -> None:
    """transformers has one window a model: give each layer the mask it makes for that layer's."""
    config = small_config((None, 4, 9, 17))
    state = random_state(config)
    ids = tokens(config)
    stand_in = small_config((None, 4, 4, 4))
    model = reference(stand_in, state)

    def use_own_window(window: int, kwargs: dict[str, Any], hidden: Tensor) -> None:
        own = transformers.MinistralConfig(
            **hugging_face_fields(stand_in) | {"sliding_window": window}
        )
        own._attn_implementation = "eager"
        kwargs["attention_mask"] = create_sliding_window_causal_mask(
            config=own,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=kwargs["position_ids"],
        )

    for layer, window in zip(model.model.layers, config.windows, strict=True):
        if window is not None:

            def hook(
                module: nn.Module, args: Any, kwargs: dict[str, Any], window: int = window
            ) -> Any:
                use_own_window(window, kwargs, args[0])
                return args, kwargs

            layer.register_forward_pre_hook(hook, with_kwargs=True)
    octavo = Transformer.from_folder(write_mistral(tmp_path, config, state))
    expected = reference_logits(model, ids)
    assert_same(octavo(ids, [len(ids)]), expected)
    assert_same(in_chunks(octavo, ids, 7), expected)


@pytest.mark.parametrize("windows", [(None,), (6,)], ids=str)
def test_mistral_type_has_its_window_on_every_layer(
    tmp_path: Path, windows: tuple[Window, ...]
) -> None:
    config = small_config(windows)
    state = random_state(config)
    ids = tokens(config)
    model = Transformer.from_folder(
        write_hugging_face(tmp_path, config, state, model_type="mistral")
    )
    expected = reference_logits(reference(config, state, "mistral"), ids)
    assert_same(model(ids, [len(ids)]), expected)


def test_layer_types_overrule_the_window(tmp_path: Path) -> None:
    config = small_config((None,))
    folder = write_hugging_face(tmp_path, config, sliding_window=4)
    ids = tokens(config)
    expected = reference_logits(load_with_transformers(folder), ids)
    assert_same(Transformer.from_folder(folder)(ids, [len(ids)]), expected)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"sliding_window": [None, 8, 8, 8]}, (None, 8, 8, 8)),
        ({"sliding_window": [None, 8]}, (None, 8)),
        ({"sliding_window": 8}, (8,)),
        ({"sliding_window": [8]}, (8,)),
        ({"sliding_window": None}, (None,)),
        ({"sliding_window": ...}, (None,)),
        ({"sliding_window": ..., "_sliding_window": [None, 8, 8, 8]}, (None, 8, 8, 8)),
        ({"sliding_window": ..., "_sliding_window": 8}, (8,)),
        ({"sliding_window": None, "_sliding_window": [8, None]}, (8, None)),
        ({"sliding_window": [256, 8]}, (None, 8)),  # a window as long as the context
    ],
    ids=str,
)
def test_each_way_params_json_writes_a_pattern(
    tmp_path: Path, fields: dict[str, Any], windows: tuple[Window, ...]
) -> None:
    config = small_config(windows)
    state = random_state(config)
    ids = tokens(config)
    model = Transformer.from_folder(write_mistral(tmp_path, config, state, **fields))
    expected = reference_logits(reference(config, state), ids)
    assert_same(model(ids, [len(ids)]), expected)


@layouts
@pytest.mark.parametrize(
    "shape",
    [
        dict(n_kv_heads=1),
        dict(n_kv_heads=4),
        dict(dim=96, head_dim=16, n_heads=6, n_kv_heads=3),  # head_dim = dim / n_heads
        dict(dim=48, head_dim=32, n_heads=8, n_kv_heads=2),  # heads wider than the stream
        dict(n_layers=1),
        dict(norm_eps=1e-5, rope_theta=1e8),
    ],
    ids=str,
)
def test_shapes(tmp_path: Path, shape: dict[str, Any], layout: str) -> None:
    windows = (8,) if shape.get("n_layers") == 1 else (None, 8)
    config = small_config(windows, **shape)
    state = random_state(config)
    ids = tokens(config)
    model = Transformer.from_folder(write(layout, tmp_path, config, state))
    expected = reference_logits(reference(config, state), ids)
    assert_same(model(ids, [len(ids)]), expected)


def test_head_dim_that_config_json_leaves_out(tmp_path: Path) -> None:
    config = small_config((8,), head_dim=16)
    ids = tokens(config)
    folder = write_hugging_face(tmp_path, config, model_type="mistral", head_dim=...)
    expected = reference_logits(load_with_transformers(folder), ids)
    assert_same(Transformer.from_folder(folder)(ids, [len(ids)]), expected)


@layouts
def test_tied_embeddings(tmp_path: Path, layout: str) -> None:
    config = small_config(tied_embeddings=True)
    state = random_state(config)
    ids = tokens(config)
    model = Transformer.from_folder(write(layout, tmp_path, config, state))
    # Tied logits grow with the embedding's norm: 8 times larger than those of the other models.
    expected = reference_logits(reference(config, state), ids)
    torch.testing.assert_close(model(ids, [len(ids)]), expected, rtol=2e-5, atol=2e-4)


@layouts
def test_shards(tmp_path: Path, layout: str) -> None:
    config = small_config()
    state = random_state(config)
    ids = tokens(config)
    folder = write(layout, tmp_path, config, state, shards=3)
    assert len(list(folder.glob("*.safetensors"))) == 3
    expected = reference_logits(reference(config, state), ids)
    assert_same(Transformer.from_folder(folder)(ids, [len(ids)]), expected)


def load_with_transformers(folder: Path, dtype: Any = torch.float32) -> Any:
    """transformers' model from a folder that it must understand without remainder."""
    auto: Any = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder, attn_implementation="eager", dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("model_type", ["mistral", "ministral"])
@pytest.mark.parametrize("max_shard_size", ["50GB", "60KB"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_folders_that_transformers_saved(
    tmp_path: Path, model_type: str, max_shard_size: str, tied: bool
) -> None:
    windows = (None, 8) if model_type == "ministral" else (8,)
    config = small_config(windows, tied_embeddings=tied)
    ids = tokens(config)
    model = reference(config, random_state(config), model_type)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    is_sharded = (tmp_path / "model.safetensors.index.json").is_file()
    assert is_sharded == (max_shard_size == "60KB")
    octavo = Transformer.from_folder(tmp_path)
    assert octavo.config == config
    expected = reference_logits(model, ids)
    torch.testing.assert_close(octavo(ids, [len(ids)]), expected, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("model_type", ["mistral", "ministral"])
def test_the_hugging_face_folders_of_these_tests_are_ones_that_transformers_reads(
    tmp_path: Path, model_type: str
) -> None:
    config = small_config((8,))
    state = random_state(config)
    ids = tokens(config)
    model = load_with_transformers(
        write_hugging_face(tmp_path, config, state, model_type=model_type, shards=2)
    )
    expected = reference_logits(reference(config, state, model_type), ids)
    assert_same(reference_logits(model, ids), expected)


def test_the_mistral_row_order_of_these_tests_is_that_of_complex_pairs() -> None:
    """Scores q·k from transformers' halves equal those from neighbours as complex numbers.

    Mistral's own definition: view neighbours as one complex number and multiply by
    exp(i · position · theta^(-2j / head_dim)).
    """
    config = small_config()
    state = random_state(config)
    x = torch.randn(20, config.dim, generator=torch.Generator().manual_seed(0))
    angles = torch.outer(
        torch.arange(20.0),
        config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim),
    )  # [T, head_dim/2]
    emb = torch.cat((angles, angles), dim=-1)[None]

    def heads(weights: State, name: str) -> Tensor:
        projected = x @ weights[f"layers.0.attention.{name}.weight"].T
        return projected.view(20, -1, config.head_dim)

    q, k = (heads(state, n).transpose(0, 1)[None] for n in ("wq", "wk"))
    q, k = modeling_ministral.apply_rotary_pos_emb(q, k, emb.cos(), emb.sin())
    expected = torch.einsum("hqd,gkd->hgqk", q[0], k[0])

    def turned(name: str) -> Tensor:
        pairs = heads(interleaved(state, config), name).reshape(20, -1, config.head_dim // 2, 2)
        rotation = torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(torch.view_as_complex(pairs) * rotation[:, None]).flatten(2)

    scores = torch.einsum("qhd,kgd->hgqk", turned("wq"), turned("wk"))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_no_worse_than_transformers(
    tmp_path: Path, layout: str, dtype: torch.dtype
) -> None:
    """Two half-precision runs differ by rounding alone, so measure each against fp32.

    The fp32 run has the same rounded weights. octavo keeps scores and rotations in fp32, where
    transformers rounds them, and is 0.83 to 0.97 of its error away over five seeds.
    """
    config = small_config()
    state = random_state(config, dtype=dtype)
    ids = tokens(config)
    exact = reference_logits(
        reference(config, {name: tensor.float() for name, tensor in state.items()}), ids
    )
    theirs = reference_logits(reference(config, state, dtype=dtype), ids)
    model = Transformer.from_folder(write(layout, tmp_path, config, state))
    assert model.dtype == dtype
    ours = model(ids, [len(ids)])
    their_error = (theirs - exact).square().mean().sqrt()
    our_error = (ours - exact).square().mean().sqrt()
    assert their_error < 0.02 * exact.std()  # the yardstick itself is only rounding
    assert our_error < 1.05 * their_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_loaded_in_the_dtype_that_is_asked_for(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    stored = torch.bfloat16 if dtype == torch.float32 else torch.float32
    config = small_config()
    state = random_state(config, dtype=stored)
    ids = tokens(config)
    model = Transformer.from_folder(write_mistral(tmp_path, config, state), dtype=dtype)
    expected = reference_logits(reference(config, state, dtype=dtype), ids)
    tolerance = FP32_ROUNDING if dtype == torch.float32 else 0.15
    assert_same(model(ids, [len(ids)]), expected, tolerance)


@patterns
def test_packed_sequences_do_not_see_each_other(
    tmp_path: Path, windows: tuple[Window, ...]
) -> None:
    config = small_config(windows)
    state = random_state(config)
    model = Transformer.from_folder(write_mistral(tmp_path, config, state))
    sequences = [tokens(config, n, seed=n) for n in (13, 1, 40, 8, 9)]
    expected = reference(config, state)
    packed = model(torch.cat(sequences), [len(s) for s in sequences])
    for rows, sequence in zip(packed.split([13, 1, 40, 8, 9]), sequences, strict=True):
        assert_same(rows, reference_logits(expected, sequence))


@patterns
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 8, 20])
def test_prefill_in_chunks(tmp_path: Path, windows: tuple[Window, ...], chunk_size: int) -> None:
    """Chunks shorter and longer than the windows, with rings that go round several times."""
    config = small_config(windows)
    state = random_state(config)
    ids = tokens(config)
    model = Transformer.from_folder(write_mistral(tmp_path, config, state))
    expected = reference_logits(reference(config, state), ids)
    assert_same(in_chunks(model, ids, chunk_size), expected)


def test_caches_of_several_sequences_go_on_from_different_lengths(tmp_path: Path) -> None:
    """Prompt chunks and single tokens mixed in one pass, as the engine mixes them."""
    config = small_config((None, 8))
    state = random_state(config)
    model = Transformer.from_folder(write_mistral(tmp_path, config, state))
    sequences = [tokens(config, 50, seed=i) for i in range(3)]
    expected = reference(config, state)
    caches = model.new_caches(3, 50)
    rows: list[list[Tensor]] = [[], [], []]
    # (sequence, tokens) of each pass; sequences come and go.
    passes = [[(0, 30)], [(0, 1), (1, 9)], [(2, 17), (0, 1), (1, 3)], [(1, 1), (0, 1), (2, 1)]]
    passes += [[(2, 32), (1, 37), (0, 17)]]
    for batch in passes:
        chunks = [sequences[i][caches[i].length :][:n] for i, n in batch]
        lengths = [n for _, n in batch]
        logits = model(torch.cat(chunks), lengths, [caches[i] for i, _ in batch])
        for (i, _), chunk in zip(batch, logits.split(lengths), strict=True):
            rows[i].append(chunk)
    for sequence, chunks in zip(sequences, rows, strict=True):
        assert_same(torch.cat(chunks), reference_logits(expected, sequence))


@pytest.mark.parametrize("chunk_size", [None, 256, 257, 1025])
@pytest.mark.parametrize("window", [300, 1100])
def test_sequences_longer_than_the_blocks_of_attention(
    tmp_path: Path, window: int, chunk_size: int | None
) -> None:
    """Windows shorter and longer than a block of keys (1024) and of queries (256)."""
    config = small_config((None, window), n_layers=2, n_heads=2, n_kv_heads=1, max_seq_len=4096)
    state = random_state(config)
    ids = tokens(config, 1500)
    model = Transformer.from_folder(write_mistral(tmp_path, config, state))
    expected = reference_logits(reference(config, state), ids)
    actual = in_chunks(model, ids, chunk_size) if chunk_size else model(ids, [len(ids)])
    # transformers takes the angles in fp32, whose rounding grows with the position.
    assert_same(actual, expected, 5e-5)


def greedy(model: Any, prompt: Sequence[int], max_tokens: int, eos_id: int | None) -> list[int]:
    """The answer of transformers' `generate`, with its own cache."""
    ids = torch.tensor([list(prompt)])
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=eos_id,
        pad_token_id=0,
    )
    new_tokens: list[int] = answer[0, len(prompt) :].tolist()
    return new_tokens


@layouts
@pytest.mark.parametrize("windows", [(None,), (16,), (None, 8, 8, 8), (None, 5)], ids=str)
def test_greedy_answers_are_those_of_transformers_generate(
    tmp_path: Path, windows: tuple[Window, ...], layout: str
) -> None:
    config = small_config(windows)
    state = random_state(config)
    model = Transformer.from_folder(write(layout, tmp_path, config, state))
    prompts = [tokens(config, n, seed=n).tolist() for n in (1, 4, 8, 27)]
    expected = reference(config, state)
    answers, logprobs = generate(prompts, model, max_tokens=40, temperature=0, chunk_size=5)
    for prompt, answer, scores in zip(prompts, answers, logprobs, strict=True):
        assert answer == greedy(expected, prompt, 40, eos_id=None)
        whole = torch.tensor(prompt + answer)
        rows = reference_logits(expected, whole)[:-1].log_softmax(-1)
        wanted = rows.gather(1, whole[1:, None])[:, 0]
        assert_same(torch.tensor(scores), wanted, 1e-4)


def test_an_answer_ends_where_transformers_ends_it(tmp_path: Path) -> None:
    config = small_config()
    state = random_state(config)
    model = Transformer.from_folder(write_mistral(tmp_path, config, state))
    prompt = tokens(config, 20).tolist()
    free = greedy(reference(config, state), prompt, 30, eos_id=None)
    eos_id = free[11]
    theirs = greedy(reference(config, state), prompt, 30, eos_id)
    assert theirs[-1] == eos_id and len(theirs) < 30
    answers, _ = generate([prompt], model, max_tokens=30, temperature=0, eos_id=eos_id)
    assert answers == [theirs[:-1]]


def test_config_json_of_transformers_5_keeps_its_rotary_base(tmp_path: Path) -> None:
    """Since transformers 5 the base lies inside `rope_parameters`, not at the top."""
    config = small_config((None,), rope_theta=123_456.0)
    reference(config, random_state(config)).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in fields
    assert fields["rope_parameters"]["rope_theta"] == 123_456.0
    assert Transformer.from_folder(tmp_path).config.rope_theta == 123_456.0
