"""What a forward over drafts allocates: nothing of the size of a cache."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import kvcomp
from kvcomp.testing.models import tiny_model

CONTEXT = 2048


@pytest.mark.parametrize(
    "method",
    [
        kvcomp.Full(),
        kvcomp.Delta(budget=64, page_size=4, recent=2),
        kvcomp.LazyEviction(budget=1536, window=64),
    ],
    ids=lambda method: method.name,
)
def test_drafts_are_checked_without_a_copy_of_the_cache(method):
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (1, CONTEXT + 16))
    with kvcomp.patch(model, method) as run, torch.no_grad():
        cache = run.new_cache()
        model(ids[:, :CONTEXT], past_key_values=cache)
        model(ids[:, CONTEXT : CONTEXT + 1], past_key_values=cache)
        held = run.report().kv_bytes_allocated

        def allocated() -> int:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
                cache.stage()
                drafts = ids[:, CONTEXT + 1 : CONTEXT + 5]
                model(drafts, past_key_values=cache)
                cache.commit(1)
            sizes = [event.cpu_memory_usage for event in found.key_averages()]
            return sum(size for size in sizes if size > 0)

        allocated()  # room for the logits of drafts, once
        assert 0 < allocated() < held / 4
