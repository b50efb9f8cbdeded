"""A tokenizer of 128 words for the tiny models: letters, a few words of reflection, a think tag."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<bos>", "<eos>", "<think>", "</think>", "\n\n", " ", ".", "{", "}", "\\boxed"]
WORDS += ["Wait", "wait", "Hmm", "But", "so", *"0123456789", *"abcdefghijklmnopqrstuvwxyz"]
TEMPLATE = "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}<think>"


def toy_tokenizer(think=True, chat=True):
    """Without `think` it has no tag that ends a thought, without `chat` no template."""
    words = [word for word in WORDS if think or "think" not in word]
    words += [f"w{index}w" for index in range(128 - len(words))]
    vocabulary = {word: index for index, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    pattern = Regex(r"</?\w+>|\n\n|\\boxed|w\d+w|Wait|wait|Hmm|But|so|.")
    raw.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    raw.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    made.padding_side = "left"
    made.chat_template = TEMPLATE if chat else None
    return made
