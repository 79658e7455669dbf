"""What the commands do with models of other families than BERT's."""

import numpy as np
import pytest
import torch
import transformers
from test_families import config_of
from test_finetuning import rows_of, write
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import fastbert
from fastbert.families import registry
from fastbert.finetuning.finetune import Request, prepare
from fastbert.finetuning.predicting import Predictor
from fastbert.finetuning.table import read_table
from fastbert.generation import MaskedModel, Template, score
from fastbert.tasks.embed import Embedder
from fastbert.tasks.errors import InputError, LoadError
from fastbert.tasks.loading import max_length_of

pytestmark = pytest.mark.usefixtures("on_torch", "undrawn")
FAMILIES = ("roberta", "electra", "distilbert", "mpnet", "albert")
KINDS = {  # that a family is fine-tuned for, beside classification
    "roberta": ["pairs", "tagging", "answering", "multiple-choice"],
    "electra": ["pairs"], "distilbert": ["answering"], "mpnet": ["tagging"], "albert": ["pairs"],
}  # fmt: skip
LORA, FREEZE = {"lora": 4}, {"freeze": 1}


def roberta_tokenizer():
    """Words as tokens, around them what RoBERTa has: two ends between the texts of a pair."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", ".", "the", "of", "is", "a", "in", "and",
             "paris", "rome", "spain", "madrid", "city", "\u0120x"]  # fmt: skip
    words += [f"word{i}" for i in range(99 - len(words))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), False, False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>", cls_token="<s>", sep_token="</s>",
        model_max_length=38, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """A tiny encoder of each family with a tokenizer of its kind."""
    found = {}
    for family in FAMILIES:
        path = found[family] = tmp_path_factory.mktemp(family)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
        if family in ("roberta", "mpnet"):
            tokenizer = roberta_tokenizer()
        tokenizer.save_pretrained(path)
        torch.manual_seed(0)
        config = config_of(family, pad_token_id=tokenizer.pad_token_id)
        getattr(transformers, registry.load(family).model.__name__)(config).save_pretrained(path)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_sentence_transformers(family, folders):
    from sentence_transformers import SentenceTransformer

    texts = ["rome is a city", "the paris of the word1 and word2 is word3", "spain"]
    plain = SentenceTransformer(str(folders[family]), device="cpu")
    expected = plain.encode(texts)
    found = Embedder.load(folders[family], device=torch.device("cpu")).embed(texts)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    long = [" ".join(["rome"] * 300)]
    windows = Embedder.load(folders[family], device=torch.device("cpu"), windows=True)
    assert windows.embed(long).shape == found[:1].shape
    with fastbert.accelerate(plain):
        np.testing.assert_allclose(plain.encode(texts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [*((family, {}) for family in FAMILIES), ("distilbert", LORA), ("mpnet", FREEZE),
     ("albert", LORA), ("albert", FREEZE)],
    ids=str,
)  # fmt: skip
def test_a_family_is_fine_tuned_and_predicts(family, options, folders, text_cache, tmp_path):
    for kind in ["classification", *([] if options else KINDS[family])]:
        run = tmp_path / kind
        data = write(tmp_path / f"{kind}.jsonl", rows_of(kind, 64))
        request = Request(
            train=data, output=str(run), model=str(folders[family]), epochs=5, batch_size=8,
            max_length=38, learning_rate=3e-3, dev_share=0.25, patience=0, device="cpu",
            cache_dir=text_cache, **options,
        )  # fmt: skip
        verdict = prepare(request).train()
        assert verdict.scores[verdict.metric] > verdict.baseline[1], kind
        plain = transformers.AutoConfig.from_pretrained(run / "best")
        assert plain.architectures[0].endswith(prepare(request).task.head)
        predictor = Predictor(run / "best", torch.device("cpu"))
        said, _, cut = predictor(read_table(data, text_cache))
        assert len(said) == 64 and (cut == 0 or kind == "answering")
        if kind != "classification":
            continue
        theirs = transformers.pipeline(
            "text-classification", str(run / "best"), device="cpu", batch_size=8
        )
        texts = [row["text"] for row in rows_of(kind, 64)]
        labels = [predictor.task.labels[i] for i in said]
        assert [answer["label"] for answer in theirs(texts)] == labels


def test_choices_of_a_family_without_a_pooler_are_refused_packed(folders, text_cache, tmp_path):
    data = write(tmp_path / "data.jsonl", rows_of("multiple-choice", 16))
    request = Request(
        train=data, output=str(tmp_path / "run"), model=str(folders["distilbert"]), max_length=38,
        dev_share=0.25, device="cpu", cache_dir=text_cache,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"pooler for multiple choice, .* distilbert"):
        prepare(request)


def test_a_family_that_is_not_covered_is_as_long_as_its_positions():
    config = transformers.DebertaConfig(max_position_embeddings=77)
    assert max_length_of(config) == 77
    assert max_length_of(config_of("roberta")) == 38 and max_length_of(config_of("electra")) == 40


def test_pre_training_goes_on_from_bert_alone(folders, texts, tmp_path):
    from fastbert.training import beginning
    from fastbert.training.request import Request as Pretraining

    request = Pretraining(texts=(str(texts),), output=str(tmp_path), model=str(folders["roberta"]))
    with pytest.raises(LoadError, match=r"of type 'bert' in .* got 'roberta'"):
        beginning.model_for(request, roberta_tokenizer())


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_a_loop(family, folders, tmp_path):
    head = next(name for name in registry.load(family).heads if name.endswith("ForMaskedLM"))
    torch.manual_seed(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[family])
    config = config_of(family, pad_token_id=tokenizer.pad_token_id)
    theirs = getattr(transformers, head)(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = MaskedModel.load(tmp_path, device=torch.device("cpu"))
    text = "rome is a city of word1"
    ids = tokenizer(text, return_tensors="pt").input_ids
    expected = 0.0
    for place in range(1, ids.shape[1] - 1):
        masked = ids.clone()
        masked[0, place] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = theirs(masked).logits[0, place].double()
        expected += logits.log_softmax(-1)[ids[0, place]].item()
    (found,) = score(model, [text])
    assert found.log_likelihood == pytest.approx(expected, rel=1e-5)
    if family == "roberta":
        with pytest.raises(InputError, match="marks where words begin"):
            Template.of("rome is <mask>", tokenizer)


@pytest.mark.parametrize(
    ("family", "head"),
    [("xlm-roberta", "XLMRobertaForSequenceClassification"),
     ("mpnet", "MPNetForSequenceClassification")],
)  # fmt: skip
def test_a_cross_encoder_says_the_same(family, head, tmp_path):
    from sentence_transformers import CrossEncoder

    pairs = [("rome is a city", "the paris of word1"), ("a", "spain is a word2 of word4"),
             ("city", "of")]  # fmt: skip
    roberta_tokenizer().save_pretrained(tmp_path)
    torch.manual_seed(0)
    getattr(transformers, head)(config_of(family, num_labels=1)).save_pretrained(tmp_path)
    model = CrossEncoder(str(tmp_path), device="cpu")
    expected = model.predict(pairs)
    with fastbert.accelerate(model) as handle:
        assert not handle.notes
        np.testing.assert_allclose(model.predict(pairs), expected, rtol=1e-4, atol=1e-5)


PIPELINES = {
    "fill-mask": ("ForMaskedLM", lambda mask: f"rome is a {mask} of spain", "token"),
    "text-classification": ("ForSequenceClassification", lambda mask: "rome is a city", "label"),
    "token-classification": ("ForTokenClassification", lambda mask: "rome is a city", "entity"),
    "zero-shot-classification": ("ForSequenceClassification", lambda mask: "rome", "labels"),
}


@pytest.mark.parametrize("task", PIPELINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pipelines_in_batches(family, task, folders):
    head, text_with, said = PIPELINES[task]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[family])
    name = next(name for name in registry.load(family).heads if name.endswith(head))
    torch.manual_seed(0)
    labels = {"label2id": {"entailment": 0, "no": 1}, "id2label": {0: "entailment", 1: "no"}}
    config = config_of(family, pad_token_id=tokenizer.pad_token_id, **labels)
    model = getattr(transformers, name)(config).eval()
    pipe = transformers.pipeline(task, model, tokenizer=tokenizer, device="cpu", batch_size=2)
    text = text_with(tokenizer.mask_token)
    texts = [text, f"the {text} and paris"] * 2
    options = {"candidate_labels": ["city", "word1"]} if task.startswith("zero") else {}
    expected = pipe(texts, **options)
    with fastbert.accelerate(model) as handle:
        assert not handle.notes
        found = pipe(texts, **options)
    flat = lambda all_of_them: [  # noqa: E731
        each for one in all_of_them for each in (one if isinstance(one, list) else [one])
    ]
    for mine, theirs in zip(flat(found), flat(expected), strict=True):
        key = "scores" if "scores" in mine else "score"
        assert mine[said] == theirs[said] and mine[key] == pytest.approx(theirs[key], rel=1e-4)
