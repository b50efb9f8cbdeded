"""Models: what `patch` refuses, and what a patched model refuses in `generate` and in forwards."""

import copy
import dataclasses
import functools
import pickle

import torch
from transformers import DynamicCache

import kvcomp
from bad_input import Attempt, Bad, bits
from kvcomp import METHODS, Delethink, Delta, Full, LazyEviction, LouisKV, StreamingLLM
from kvcomp.hf import Cache, attention
from kvcomp.testing.models import tiny_model

NEVER = 1000  # an EOS that no tiny model knows
WIDTH, PAD, LAYERS = 21, 6, 4
LAZY = LazyEviction(budget=12, window=4, alpha=0.05)
SHORT = Delethink(chunk=13, carry=6, head=2, max_chunks=None)
SPARSE = {"full": Full(), "delta": Delta.example(8), "lazy": LAZY, "louis": LouisKV.example(16)}


@functools.cache
def model_of(kind, **overrides):
    return tiny_model(kind, **overrides)


def llama():
    return model_of("llama")


def dynamic_rope():
    rope = (("rope_type", "dynamic"), ("rope_theta", 1e4), ("factor", 2.0))
    return tiny_model("llama", rope_parameters=dict(rope))


def padded_batch():
    ids = torch.randint(3, 128, (2, WIDTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :PAD] = mask[0, :PAD] = 0
    return {"input_ids": ids, "attention_mask": mask}


def one_row():
    return {name: tensor[1:] for name, tensor in padded_batch().items()}


def generate(model, batch=None, **options):
    given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": NEVER, **options}
    return model.generate(**(padded_batch() if batch is None else batch), **given)


def logits(model):
    with torch.no_grad():
        return bits(model(**padded_batch(), use_cache=False).logits)


def marks(model):
    """What a patch leaves on a model: nothing, once it is undone or refused."""
    decoder, config = model.get_decoder(), model.config.get_text_config(decoder=True)
    return (
        config._attn_implementation,
        sorted(model.__dict__),
        [name for name, module in model.named_modules() if "_kvcomp_run" in module.__dict__],
        len(decoder._forward_pre_hooks),
        len(decoder._forward_hooks),
        id(config) in attention.RUNS,
    )


def patching(model=llama, method=Full, **options):
    """`kvcomp.patch(model(), method(), ...)`, after which the model decodes as it did before."""

    def make():
        made, chosen = model(), method() if callable(method) else method
        is_model = hasattr(made, "generate") and hasattr(made, "get_decoder")

        def state():
            return (marks(made), logits(made)) if is_model else None

        return Attempt(lambda: kvcomp.patch(made, chosen, **options).undo(), state)

    return make


def within(method, action, batch=padded_batch, model=llama, **options):
    """`action(model, run, cache)` on a patched model; the cache has a prompt, and goes on."""

    def make():
        patched = model()
        before = marks(patched), logits(patched)
        run = kvcomp.patch(patched, method, **options)
        prompt, cache = batch(), run.new_cache()
        with torch.no_grad():
            patched(**prompt, past_key_values=cache)
        positions = prompt["attention_mask"].sum(1, keepdim=True)

        def act():
            with torch.no_grad():
                return action(patched, run, cache)

        def state():
            probe = copy.deepcopy(cache)
            with torch.no_grad():
                out = patched(positions + 9, position_ids=positions, past_key_values=probe)
            return run.config._attn_implementation, cache.get_seq_length(), bits(out.logits)

        def close():
            run.undo()
            assert (marks(patched), logits(patched)) == before

        return Attempt(act, state, close)

    return make


def generating(method, batch=padded_batch, **options):
    """`generate` with its own cache, or with what `options` say."""
    return within(method, lambda model, run, cache: generate(model, batch(), **options))


def forward(method, new=1, **changes):
    """`new` tokens over the prompt, with other arguments."""

    def action(model, run, cache):
        ids = padded_batch()["input_ids"][:, -new:]
        return model(**{"input_ids": ids, "past_key_values": cache, **changes})

    return within(method, action)


def mask(width, *hidden):
    """[2, width] of 1, but for the padding and the columns listed of row 0."""
    found = torch.ones(2, width, dtype=torch.long)
    found[0, :PAD] = 0
    found[0, list(hidden)] = 0
    return found


def second_turn(model, run, cache):
    options = {"return_dict_in_generate": True, "eos_token_id": NEVER}
    first = generate(model, one_row(), **options)
    turn = torch.cat([first.sequences, one_row()["input_ids"][:, :5]], 1)
    return model.generate(turn, **options, past_key_values=first.past_key_values)


def embedded(model, run, cache):
    embeds = model.get_input_embeddings()(padded_batch()["input_ids"])
    return model.generate(inputs_embeds=embeds, max_new_tokens=4, eos_token_id=NEVER)


def another_run(model, run, cache):
    other = kvcomp.patch(tiny_model("llama"), Full())
    return generate(model, past_key_values=other.new_cache())


def a_context(run):
    """A cache that counts for this run, but is no `ChunkedCache`."""
    return Cache(run.config, Full(), run.meter)


def another_model(model, run, cache):
    return tiny_model("llama")(padded_batch()["input_ids"][:, :1], past_key_values=cache)


def right_padded():
    return {name: tensor.flip(1) for name, tensor in padded_batch().items()}


def long_prompt():
    ids = torch.full((1, 500), 7)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def calibrating(method, prompts=([3, 4, 5],), max_new_tokens=4, **fields):
    """On a model that is not patched, and must not be afterwards."""

    def run():
        method.calibrate(llama(), prompts, max_new_tokens=max_new_tokens, **fields)

    return lambda: Attempt(run, lambda: marks(llama()))


NOT_STATIC = [name for name, method in METHODS.items() if not method.static]
H2O_1 = METHODS["h2o"](budget=32, window=1)
LOOKUP = {"prompt_lookup_num_tokens": 3, "eos_token_id": 2}
PATCH = [
    Bad(patching(method=lambda: "delta"), "method: expected a kvcomp method .* 'delta'", TypeError),
    Bad(patching(method=lambda: Delta), "method: expected a kvcomp method", TypeError),
    Bad(patching(method=lambda: None), "method: expected a kvcomp method .*None", TypeError),
    Bad(patching(lambda: torch.nn.Linear(2, 2)), "that can generate, got Linear", TypeError),
    Bad(patching(lambda: llama().model), "that can generate, got LlamaModel", TypeError),
    Bad(patching(lambda: "Qwen/Qwen3-8B"), "that can generate, got str", TypeError),
    Bad(patching(lambda: None), "that can generate, got NoneType", TypeError),
    Bad(patching(method=lambda: Delta(delta_layers=(2, 40))), "delta_layers: .* up to 3, got"),
    Bad(patching(method=lambda: Delta(warmup=4)), "warmup=4 needs more layers than the 4"),
    Bad(patching(method=lambda: LouisKV(dense_layers=4)), "expected fewer than the 4 layers"),
    Bad(patching(method=lambda: Delethink(inner=LouisKV(dense_layers=4))), "LouisKV: dense_layers"),
    Bad(patching(lambda: model_of("llama", head_dim=16)), "heads of size 16; supported are"),
    Bad(patching(lambda: model_of("mistral", sliding_window=16), LAZY), "no full-attention layer"),
    Bad(patching(lambda: model_of("glm4"), StreamingLLM), "moves keys to other positions"),
    Bad(patching(method=Delethink(512, 6, head=2)), "chunk: 512 tokens of output in a context"),
    Bad(patching(method=Delethink(505, 6, head=7, variant="paper")), "chunk: 512 tokens"),
    Bad(
        patching(method=dataclasses.replace(SHORT, reset="streaming", inner=LouisKV.example())),
        "LouisKV would hold the prompt twice in host memory",
    ),
    Bad(
        patching(lambda: model_of("glm4"), dataclasses.replace(SHORT, reset="rotate")),
        "rotate them in the usual way",
    ),
    Bad(
        patching(lambda: model_of("gemma3_text"), dataclasses.replace(SHORT, reset="rotate")),
        "Gemma3ForCausalLM has layers whose cache does not keep every token; use 'prefill'",
    ),
    Bad(
        patching(dynamic_rope, dataclasses.replace(SHORT, reset="streaming")),
        "LlamaForCausalLM changes its rotary frequencies",
    ),
    Bad(patching(linear_rows="on"), "linear_rows: expected True or False, got 'on'", TypeError),
    Bad(patching(linear_rows=1, max_tokens=80), "linear_rows: expected True or False", TypeError),
    Bad(patching(max_tokens=0), "max_tokens: expected at least 1, got 0"),
    Bad(patching(max_tokens=-1), "max_tokens: expected at least 1, got -1"),
    Bad(patching(max_tokens=1.5), "max_tokens: expected a number, got 1.5", TypeError),
    Bad(patching(max_tokens="80"), "max_tokens: expected a number, got '80'", TypeError),
    Bad(patching(max_tokens=True), "max_tokens: expected a number, got True", TypeError),
    Bad(patching(lambda: model_of("gemma3_text"), max_tokens=80), "sliding or linear layers"),
    *(
        Bad(
            patching(method=METHODS[name].example(), max_tokens=80),
            "max_tokens: .* leave max_tokens out",
        )
        for name in NOT_STATIC
    ),
]
PATCHED_ALREADY = "LlamaForCausalLM is patched already, or shares its config"
RUN = [
    Bad(within(Full(), lambda model, run, cache: kvcomp.patch(model, LAZY)), PATCHED_ALREADY),
    Bad(
        within(Full(), lambda m, run, cache: kvcomp.patch(type(m)(m.config), Full())),
        PATCHED_ALREADY,
    ),
    *(
        Bad(generating(method, **options), match)
        for method in (*SPARSE.values(), SHORT)
        for options, match in (
            ({"use_cache": False}, "use_cache=False.: a method needs its cache"),
            ({"cache_implementation": "static"}, "'static'.: the patched model uses its own cache"),
            ({"past_key_values": DynamicCache()}, "a cache of this run .*got DynamicCache"),
            ({"past_key_values": "mine"}, "a cache of this run .*got str"),
            (
                {"output_attentions": True, "return_dict_in_generate": True},
                "output_attentions: expected False, as the kernels never store weights",
            ),
        )
    ),
    *(
        Bad(
            generating(method, one_row, **LOOKUP),
            f"assisted decoding checks several tokens at once, which {method.name} cannot do",
        )
        for method in (H2O_1, dataclasses.replace(SHORT, inner=H2O_1))
    ),
    Bad(within(Full(), another_run), "a cache of this run .*got Cache"),
    Bad(within(Full(), another_model), "past_key_values: expected the model .* made for"),
    Bad(within(SHORT, another_model), "past_key_values: expected the model .* made for"),
    Bad(within(Full(), lambda m, run, cache: copy.deepcopy(m)), "cannot be copied", TypeError),
    Bad(within(Full(), lambda m, run, cache: pickle.dumps(m)), "copied or pickled", TypeError),
    Bad(within(SHORT, lambda m, run, c: generate(m, past_key_values=a_context(run))), "of this"),
    Bad(generating(SHORT, eos_token_id=None), "names no EOS token"),
    Bad(generating(SHORT, num_beams=2), "num_beams"),
    Bad(generating(SHORT, right_padded), "padding on the left only"),
    Bad(generating(SHORT, long_prompt), "a context of 513; the model knows 512 positions"),
    Bad(within(SHORT, second_turn), "a second turn cannot continue from this cache"),
    Bad(within(SHORT, embedded), "inputs_embeds: delethink encodes tokens again"),
    Bad(forward(SHORT, attention_mask=mask(WIDTH)), "expected 22 columns .21 seen, 1 new., got"),
    Bad(forward(SHORT, attention_mask=mask(WIDTH + 1, WIDTH)), "a row cannot skip a step"),
    *(
        bad
        for method in SPARSE.values()
        for bad in (
            Bad(forward(method, attention_mask=mask(5)), "expected 22 columns .*got 5"),
            Bad(forward(method, 2, attention_mask=mask(22)), "expected 23 columns .*got 22"),
            Bad(
                forward(method, 2, attention_mask=mask(23, 9)), "hides tokens that are in the cache"
            ),
            Bad(
                forward(method, attention_mask=torch.ones(2, 1, 1, 22).bool()),
                r"attention_mask: expected \[B, tokens\] .*got \[2, 1, 1, 22\]",
            ),
            Bad(forward(method, attention_mask="none"), "attention_mask: expected .*got str"),
            Bad(forward(method, output_attentions=True), "output_attentions"),
            Bad(forward(method, past_key_values=DynamicCache()), "a cache of this run"),
        )
    ),
    *(
        Bad(within(method, lambda model, run, cache: cache.kv.crop(1)), "cannot take tokens back")
        for method in (LAZY, SPARSE["louis"])
    ),
    *(
        Bad(within(method, lambda model, run, cache: cache.kv.crop(100)), "has seen")
        for method in (Full(), SPARSE["delta"])
    ),
]
CALIBRATE = [
    Bad(calibrating(Delta, budget=1024), "Delta.calibrate: .*smaller budget"),
    Bad(calibrating(LazyEviction, budget=96), "LazyEviction.calibrate: .*smaller budget"),
    Bad(calibrating(LouisKV, max_new_tokens=2), "LouisKV.calibrate: no two decode steps"),
    Bad(calibrating(LouisKV, rate=2), "rate: expected 0 to 1, got 2"),
    Bad(calibrating(LouisKV, rate=float("nan")), "rate: expected 0 to 1, got nan"),
    *(
        Bad(
            calibrating(method, prompts),
            f"prompts: expected several, each a text or token ids, got one: {kind}",
            TypeError,
        )
        for method in (Delta, LazyEviction, LouisKV)
        for prompts, kind in (("x", "str"), ([3, 4], "list"), (torch.tensor([3, 4]), "Tensor"))
    ),
    Bad(calibrating(Delta, []), "prompts: expected at least one, got none"),
    Bad(calibrating(Delta, ["text"]), "tokenizer: expected one, as prompts are texts, got None"),
]
ROWS = [*PATCH, *RUN, *CALIBRATE]
