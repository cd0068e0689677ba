"""The study `sparsity`: what is measured of a folder, and what is said of measures made up."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_mone.commands.app import main
from megatron_mone.studies.catalogue import study_of
from megatron_mone.studies.catalogue.sparsity import DENSE
from megatron_mone.studies.document import Measure
from megatron_mone.studies.measuring import neuron_needs
from megatron_mone.studies.measuring.sparsity_names import (
    AS_IT_IS,
    CHANCE,
    CRITERIA,
    GATE,
    LAYER_SHARES,
    LAYERS_AS_THEY_ARE,
    LENGTH,
    LOSS,
    MASS,
    ONE_LAYER,
    OWN,
    PRODUCT,
    RANDOM,
    RIGHT,
    SHARES,
    SIZES,
    USE,
    USE_QUANTILES,
    parts_of,
)
from megatron_mone.studies.page import study_page
from megatron_mone.studies.quality_by_share import (
    added,
    as_it_is,
    between,
    has_signal,
    keeps_answers,
    keeps_loss,
    samples,
    smallest_share,
)
from megatron_mone.studies.tasks import Task, measure_missing
from tests.unit.studies.made_up import made_up

ASKED = {"tokens": 64, "length": 16, "layer_tokens": 32, "questions": 2}
LETTERS = "abcdefghijklmnopqrstuvwxyz ."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A llama of two layers with random weights, that reads letters."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)
    )  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    model.save_pretrained(path)
    words = {letter: n for n, letter in enumerate(["</s>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the old tree and a stone of light. " * 6)
    return path


def measured(folder, text, part, **other):
    return {of: (x, y) for of, x, y in neuron_needs.of_model(str(folder), part, str(text),
                                                             **{**ASKED, **other})}  # fmt: skip


def test_losses_are_of_blocks_that_lie_evenly_over_the_text(folder, text):
    """By hand: each behind the text's end, all of its letters predicted."""
    found = measured(folder, text, "itself")
    assert found[OWN] == ([0], [1.0])
    assert found[LENGTH] == ([0], [16])
    model = LlamaForCausalLM.from_pretrained(folder)
    ids = [1 + LETTERS.index(letter) for letter in text.read_text()]
    wanted = []
    for start in (round(n * (len(ids) - 16) / 3) for n in range(4)):
        row = torch.tensor([[0, *ids[start : start + 16]]])
        with torch.no_grad():
            logits = model(row[:, :-1]).logits[0].double().log_softmax(-1)
        wanted.append(-sum(logits[n, row[0, n + 1]].item() for n in range(16)) / 16)
    assert found[AS_IT_IS] == ([1.0] * 4, pytest.approx(wanted, rel=1e-5))
    assert found[LAYERS_AS_THEY_ARE][1] == found[AS_IT_IS][1][::2]


def test_a_task_is_measured_in_a_process_of_its_own(folder, text, tmp_path):
    asked = {**ASKED, "folder": str(folder), "text": str(text), "part": f"losses:{GATE}"}
    task = Task("M", 7, "neuron_needs:of_model", {**asked, "seen": {"files": []}})
    (found,) = measure_missing([task], tmp_path, lambda *words: None)
    x, y = measured(folder, text, f"losses:{GATE}")[LOSS.format(GATE)]
    assert (found.of, found.cell, found.seed, found.x) == (LOSS.format(GATE), "M", 7, x)
    assert found.y == pytest.approx(y, rel=1e-5)


def test_every_share_by_every_criterion_and_one_layer_at_a_time(folder, text):
    whole = measured(folder, text, "itself")[AS_IT_IS][1]
    for part in parts_of(answers=False)[1:]:
        ((of, (x, y)),) = measured(folder, text, part).items()
        if part.startswith("layers"):
            assert of == ONE_LAYER.format(float(part.partition(":")[2]))
            assert x == [0.0, 0.0, 1.0, 1.0]
            continue
        assert of == LOSS.format(part.partition(":")[2])
        assert x == [share for share in SHARES for _ in range(4)]
        assert y[:4] == whole  # every neuron
        assert y[-4:] != whole


def test_distributions_are_of_what_the_model_computes(folder, text):
    found = measured(folder, text, "itself")
    sizes, mass = found[SIZES], found[MASS.format(GATE)]
    assert math.fsum(sizes[1]) == pytest.approx(1)
    assert (mass[0], mass[1][0]) == (SHARES, pytest.approx(1))
    assert mass[1] == sorted(mass[1], reverse=True)
    assert mass[1][-1] > 1 / 48  # the largest has more than an even part
    use = found[USE]
    assert use[0] == USE_QUANTILES
    assert 0 <= use[1][0] <= use[1][-1] <= 4 + 1e-6
    assert found[MASS.format(PRODUCT)][1] != mass[1]


def test_answers_are_lm_evals(folder, text):
    pytest.importorskip("lm_eval")
    found = measured(folder, text, f"answers:{GATE}")
    x, y = found[RIGHT.format(GATE)]
    assert x == [share for share in SHARES for _ in range(4)]
    assert {*y} <= {0.0, 1.0}
    assert found[CHANCE] == ([0], [0.125])


def test_what_cannot_be_measured_is_refused_in_a_line(folder, text, tmp_path):
    with pytest.raises(ValueError, match=r"--text: .* has 210 tokens, 1024 are asked for"):
        measured(folder, text, "itself", tokens=1024)
    with pytest.raises(ValueError, match=r"--text .*none\.txt"):
        measured(folder, tmp_path / "none.txt", "itself")
    with pytest.raises(ValueError, match=r"config\.json"):
        measured(tmp_path, text, "itself")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ratio", "--text", "none.txt"], "--text none.txt: ratio measures no text"),
        (["sparsity", "--text", "none.txt"], "--text none.txt is no file"),
        (["sparsity", "--model", "none"], "--model none: none is no folder"),
    ],
)
def test_a_wrong_option_is_refused_before_a_run(capsys, words, said):
    assert main(["study", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_its_runs_are_those_of_other_studies():
    ours = study_of("sparsity")
    values = ours.presets["cpu"].values
    found = [(cell.name, cell.values) for cell in ours.grid(ours.presets["cpu"])]
    for (name, changed), other in zip(found, ("activation", "ratio"), strict=True):
        theirs = study_of(other)
        (cell,) = (one for one in theirs.grid(theirs.presets["cpu"]) if one.name == name)
        assert changed == cell.values
        assert values == theirs.presets["cpu"].values


def made(costs, own=1.0, answers=None):
    """Results of a given model, of four blocks, whose losses rise by `costs` of a share."""
    results = made_up(study_of("sparsity"), {})
    base = [3.0, 3.2, 2.8, 3.0]
    shares = sorted({*SHARES, own}, reverse=True)

    def add(of, x, y, seed=0):
        results.measures.append(Measure(of=of, cell="M", seed=seed, x=[*x], y=[*y]))

    add(OWN, [0], [own])
    add(LENGTH, [0], [16])
    for of in (AS_IT_IS, LAYERS_AS_THEY_ARE):
        add(of, [own] * 4, base)
    for name in CRITERIA:
        rise = [costs(share) * (2 if name == RANDOM else 1) for share in shares]
        spread = (-0.001, 0.001, 0.0, 0.0)
        losses = [one + more + d for more in rise for one, d in zip(base, spread, strict=True)]
        add(LOSS.format(name), [share for share in shares for _ in base], losses)
        if answers:
            right = [float(n < 4 * answers(share)) for share in shares for n in range(8)]
            add(RIGHT.format(name), [share for share in shares for _ in range(8)], right)
            add(CHANCE, [0], [0.1])
    for share in LAYER_SHARES:
        add(ONE_LAYER.format(share), [0.0] * 4 + [1.0] * 4, [*base, *base])
    add(SIZES, [0.1, 1.0], [0.5, 0.5])
    for name in (GATE, PRODUCT):
        add(MASS.format(name), SHARES, SHARES)
    add(USE, USE_QUANTILES, USE_QUANTILES)
    return results


def test_the_share_that_keeps_quality_lies_between_those_measured():
    """Loss 3, in nats 0.3 (1 - s): 1% more is lost at s = 0.9, 5% at s = 0.5."""
    results = made(lambda share: 0.3 * (1 - share))
    one, five = (keeps_loss(results, "M", GATE, lost) for lost in (0.01, 0.05))
    assert (one.count, one.half_width) == (1, None)
    assert one.mean == pytest.approx(math.exp(math.log(0.7) / 3), rel=1e-6)  # 0.03 of 0.09
    assert five.mean == pytest.approx(0.5)
    assert keeps_loss(results, "M", RANDOM, 0.05).mean == pytest.approx(
        math.exp(math.log(0.7) * 0.15 / 0.18)
    )
    assert keeps_loss(made(lambda share: 0.0), "M", GATE, 0.01).mean == SHARES[-1]


def test_from_its_own_share_one_goes_down_or_up():
    margins = {1.0: -1.0, 0.5: 1.0, 0.25: 1.0, 0.1: -1.0, 0.05: 2.0}
    assert smallest_share(margins, 0.25) == pytest.approx((0.25 * 0.1) ** 0.5)
    assert smallest_share({1.0: 1.0, 0.5: 1.0, 0.25: -1.0}, 0.25) == pytest.approx(
        (0.5 * 0.25) ** 0.5
    )
    assert smallest_share({1.0: -1.0, 0.25: -2.0}, 0.25) is None


def test_differences_are_paired_block_by_block_and_seed_by_seed():
    results = made(lambda share: 0.3 * (1 - share))
    values = samples(results, LOSS.format(GATE), "M")
    found = added(values[0.5], as_it_is(results, "M"))
    assert (found.mean, found.count) == (pytest.approx(0.15), 4)
    assert found.half_width < 0.002  # though blocks differ by 0.4
    assert between(values, (0.5 * 0.4) ** 0.5)[2] == pytest.approx(2.8 + 0.165)
    for seed in (1, 2):
        results.measures.append(
            Measure(of="v", cell=DENSE, seed=seed, x=[1, 1, 0.5, 0.5], y=[1, 2, seed, seed])
        )
    assert samples(results, "v", DENSE) == {1: [1.5, 1.5], 0.5: [1, 2]}


def test_answers_count_only_above_chance():
    results = made(lambda share: 0.0, answers=lambda share: 2.0 if share > 0.3 else 1.0)
    assert has_signal(results, "M")
    kept = keeps_answers(results, "M", GATE, 0.05).mean
    assert 0.3 < kept < 0.4
    assert not has_signal(made(lambda share: 0.0, answers=lambda share: 0.0), "M")
    assert not has_signal(made(lambda share: 0.0, answers=lambda share: 0.25), "M")


@pytest.mark.parametrize(
    ("costs", "own", "said"),
    [
        (lambda s: 0.0, 1.0, ("the loss) holds", "5%) holds")),
        (lambda s: 0.01 / s, 1.0, ("the loss) holds", "5%) holds")),
        (lambda s: 0.3 * (1 - s), 1.0, ("the loss) does not hold", "5%) does not hold")),
        (lambda s: 0.0 if s > 0.15 else 0.5, 1.0, ("the loss) holds", "5%) does not hold")),
        (lambda s: 0.1 if s < 0.25 else 0.0, 0.25, ("60% of the 25% that it keeps", "does not")),
    ],
)
def test_the_published_claim_is_judged_by_the_numbers(costs, own, said, tmp_path):
    study, results = study_of("sparsity"), made(costs, own)
    claim = study.findings(results)[0]
    assert all(one in claim for one in said), claim
    assert claim in study_page(study, results, tmp_path).replace("&#x27;", "'")


def test_the_page_shows_every_model_and_where_nothing_was_asked(tmp_path):
    study = study_of("sparsity")
    results = made(lambda share: 0.3 * (1 - share), answers=lambda share: 2 * share)
    page = study_page(study, results, tmp_path)
    assert "+0.150*" in page  # at a half
    assert "50.0%" in page  # keeps 95%
    for name in CRITERIA:
        assert name in page
    assert "lm-eval or accelerate is not installed" in study_page(
        study, made(lambda share: 0.0), tmp_path
    )
    assert study.sections(made_up(study, {})) == []
