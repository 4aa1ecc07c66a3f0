"""examples/paged.py: continuous batching on pages, token for token what transformers generates for each text alone."""

import pytest
from processes import PACKAGE, ROOT, succeeds

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch", reason="transformers models need torch")

from transformer_models import prompt  # noqa: E402

from examples import paged  # noqa: E402
from minivllm.testing.models import causal_lm  # noqa: E402

LENGTHS, NEW = (19, 1, 5, 33, 16, 7, 15, 40), (6, 20, 1, 12, 17, 3, 9, 2)


@pytest.mark.parametrize("batch_size, pages", [(4, 64), (3, 5), (8, 32)])
def test_eight_sequences(batch_size, pages, device):
    """(3, 5): most of the time it is pages that are waited for, and they hold what others left there."""
    model = causal_lm("tiny-qwen3", device=device)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    prompts = [prompt(1, length, seed).to(device) for seed, length in enumerate(LENGTHS)]
    expected = [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)[
            0, ids.shape[1] :
        ].tolist()
        for ids, new in zip(prompts, NEW)
    ]
    assert paged.generate(model, [ids[0].tolist() for ids in prompts], NEW, batch_size, pages) == expected


def test_too_few_pages():
    with pytest.raises(ValueError, match="40 tokens need more than 2 pages of 16"):
        paged.generate(causal_lm("tiny-qwen3"), [[1] * 30], [10], pages=2)


def test_the_example(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    causal_lm("tiny-qwen3").save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    arguments = ("-m", "examples.paged", str(tmp_path), "w3 w4 w5", "w7", "--max-new-tokens", "5", "--device", "cpu")
    printed = succeeds(None, arguments=arguments, paths=(PACKAGE, ROOT)).splitlines()
    assert len(printed) == 2 and printed[0].startswith("w3 w4 w5") and printed[1].startswith("w7")
