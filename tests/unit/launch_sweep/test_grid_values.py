"""--grid: one spelling a number, all combinations, and mistakes found before anything starts."""

from fractions import Fraction

import pytest

from launch.spec.grid import number_text, read_grid

RUN = {"overlap_grad_reduce": True, "gradient_accumulation_fusion": False}


ENDING = ("1/2", "1/4", "3/8", "1/1024", "-7/5", "0.125", "3e-4", "16", "2E3", ".5", "1.", "0")


@pytest.mark.parametrize("text", [*ENDING, "-0.0", "12345678901234567890"])
def test_a_decimal_that_ends_is_exact(text):
    shown = number_text(text)
    assert shown is not None
    assert Fraction(shown) == Fraction(text)
    assert "e" not in shown.lower()
    assert "/" not in shown


@pytest.mark.parametrize(
    "text", ["1/3", "2/7", "1/1125899906842624", "1e-300", "0.1234567890123456789012"]
)
def test_other_numbers_keep_their_float64(text):
    shown = number_text(text)
    assert shown is not None
    assert float(shown) == float(Fraction(text))


@pytest.mark.parametrize(
    "spellings", [("1/2", "0.5", ".50", "5e-1", "2/4"), ("3e-4", "0.0003", "0.30e-3"), ("1", "1.0")]
)
def test_a_number_has_one_spelling(spellings):
    assert len({number_text(text) for text in spellings}) == 1


@pytest.mark.parametrize("text", ["", "half", "1/2/3", "1 /2", "nan", "inf", "1e9999", "٣", "0x10"])
def test_what_is_no_number_is_not_made_one(text):
    assert number_text(text) is None


def test_a_number_beyond_float64_is_refused():
    with pytest.raises(ValueError, match="too large"):
        number_text("1e999")


def test_a_grid_is_all_combinations_with_their_flags():
    points = read_grid(["r=1/2,1/4", "lr=3e-3,0.001"], {}, [])
    assert [dict(point.values) for point in points] == [
        {"mone_neuron_ratio": r, "lr": lr} for r in ("0.5", "0.25") for lr in ("0.003", "0.001")
    ]
    assert points[1].flags == ("--mone-neuron-ratio", "0.5", "--lr", "0.001")


def test_a_value_written_twice_is_one_point():
    assert len(read_grid(["r=1/2,0.5,2/4"], {}, [])) == 1


def test_text_and_choices_are_taken_as_they_are():
    (point,) = read_grid(["moe_router_load_balancing_type=seq_aux_loss"], {}, [])
    assert point.flags == ("--moe-router-load-balancing-type", "seq_aux_loss")
    (point,) = read_grid(["tokenizer_model=1.50"], {}, [])
    assert dict(point.values) == {"tokenizer_model": "1.50"}


def test_a_layer_pattern_is_one_value_and_an_enum_has_its_own_names():
    points = read_grid(["moe_layer_freq=[0,1],2", "attention_backend=flash,local"], {}, [])
    assert [point.flags for point in points] == [
        ("--moe-layer-freq", freq, "--attention-backend", backend)
        for freq in ("[0,1]", "2") for backend in ("flash", "local")
    ]  # fmt: skip
    with pytest.raises(ValueError, match="must be one of flash, fused, unfused, local, auto"):
        read_grid(["attention_backend=AttnBackend.flash"], {}, [])


def test_a_switch_is_a_flag_or_none():
    on, off = read_grid(["overlap_param_gather=true,false"], {}, [])
    assert (on.flags, off.flags) == (("--overlap-param-gather",), ())
    assert off.values == (("overlap_param_gather", "false"),)


def test_text_of_a_type_that_evaluates_is_not_evaluated(tmp_path):
    """Megatron's type of moe_layer_freq runs eval() on it."""
    canary = tmp_path / "canary"
    read_grid([f"moe_layer_freq=open('{canary}','w')"], {}, [])
    assert not canary.exists()


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["lrr=1"], r"--grid lrr: unknown argument .did you mean 'lr'"),
        (["mone_neuron_ration=1/2"], "did you mean 'mone_neuron_ratio'"),
        (["r=1/0"], "--grid mone_neuron_ratio=1/0: 1/0 is over zero"),
        (["r=half"], "must be a number or a fraction such as 1/4"),
        (["r=nan"], "must be a number"),
        (["seed=1/2"], "--grid seed=1/2: must be a whole number"),
        (["r=1/2,"], "must be ARGUMENT=VALUE,VALUE, like r=1/2"),
        (["r="], "must be ARGUMENT=VALUE,VALUE"),
        (["r"], "must be ARGUMENT=VALUE,VALUE"),
        (["r=1/2", "mone_neuron_ratio=1/4"], "mone_neuron_ratio is given twice"),
        (["save=x"], "each case has a folder of its own"),
        (["help=x"], "unknown argument"),
        (["moe_router_load_balancing_type=aux_los"], "must be one of .* .did you mean 'aux_loss'"),
        (["overlap_param_gather=1"], "must be true or false"),
        (["overlap_grad_reduce=true,false"], "overlap_grad_reduce=false: Megatron has no flag"),
        (["gradient_accumulation_fusion=true"], "Megatron has no flag"),
    ],
)  # fmt: skip
def test_a_wrong_grid_is_one_line(texts, said):
    with pytest.raises(ValueError, match=said) as refusal:
        read_grid(texts, RUN, [])
    assert "\n" not in str(refusal.value)


def test_a_switch_that_a_flag_turned_on_cannot_be_turned_back():
    with pytest.raises(ValueError, match="no flag to turn this back"):
        read_grid(["overlap_param_gather=false"], {}, ["--overlap-param-gather"])
