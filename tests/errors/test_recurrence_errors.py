"""Every refusal of the language and the derivation: what was written, what was expected, how to fix it."""

import math
import re

import numpy
import pytest
import torch

import kdagen as kg
from kdagen.derive.canonical import canonical
from kdagen.pipeline import compile_op


def refused(body, *words):
    """Recording or deriving `body` is refused with a message that names it and has all of `words`."""
    with pytest.raises(kg.RecurrenceError) as e:
        canonical(kg.recurrence(body))
    message = str(e.value)
    assert message.startswith(f"recurrence '{body.__name__}': ")
    for word in words:
        assert word in message
    return message


def delta(S, k, v, beta=1.0):
    return S + kg.outer(k, beta * (v - S.T @ k))


# Linear in the state.


@pytest.mark.parametrize(
    "term, why",
    [
        (lambda S, q, k, v: S * S, "'S * S' is not linear in the state: both operands hold the state"),
        (lambda S, q, k, v: kg.exp(S), "'exp(S)' is not linear"),
        (lambda S, q, k, v: S.T @ S, "'S.T @ S' is not linear"),
        (lambda S, q, k, v: kg.outer(k, (S.T @ k) * (S.T @ q)), "'S.T @ k * S.T @ q' is not linear"),
        (lambda S, q, k, v: kg.outer(k, v / (S.T @ k)), "divides by something that holds the state"),
        (lambda S, q, k, v: kg.outer(k, kg.l2norm(S.T @ k)), "'l2norm(S.T @ k)' is not linear"),
        (lambda S, q, k, v: kg.diag(kg.sigmoid(S @ v)) @ S, "'sigmoid(S @ v)' is not linear"),
        (lambda S, q, k, v: abs(S), "'abs(S)' is not linear"),
        (lambda S, q, k, v: S**2, "'S ** 2' is not linear"),
    ],
)
def test_not_linear_in_the_state(term, why):
    def bad(S, q, k, v):
        return term(S, q, k, v), S.T @ q

    refused(bad, why, "A gate, norm or product may use the arguments, never S")


def test_sum_over_value_channels_of_a_read():
    def bad(S, q, k, v):
        return S + kg.outer(k, kg.dot(S.T @ k, v) * v), S.T @ q

    refused(bad, "dot(S.T @ k, v)", "couples them", "only S.T @ x")


def test_value_gate_on_a_read():
    def bad(S, q, k, v, w: kg.Value):
        return S + kg.outer(k, v), w * (S.T @ q)

    refused(bad, "'w * S.T @ q'", "multiplies a read of the state by the value vector 'w'", "after the op")


# The value side, and operators outside the family.


@pytest.mark.parametrize("term", [lambda S, v: S @ v, lambda S, v: S @ kg.diag(v)])
def test_a_matrix_on_the_value_side(term):
    def bad(S, q, k, v):
        return S + kg.outer(k, v) + term(S, v), S.T @ q

    refused(bad, "'S @ ", "The state is K x V: a read is S.T @ x", "value-side decay is outside the family")


def test_value_decay():
    def bad(S, q, k, v, w: kg.Value):
        return w * S + kg.outer(k, v), S.T @ q

    refused(bad, "'w * S'", "'w' is a value vector (it is annotated kg.Value)", "Only a scalar may multiply a matrix")


def test_channel_gate_without_diag():
    def bad(S, q, k, v, g: kg.Channel):
        return kg.exp(g) * S + kg.outer(k, v), S.T @ q

    refused(bad, "'exp(g) * S'", "to scale the rows of the state write kg.diag(d) @ S")


def test_full_operator():
    def bad(S, q, k, v, A):
        return A @ S + kg.outer(k, v), S.T @ q

    refused(
        bad, "'A @ S' is a value vector", "never matrices", "a K x K operator on the state is kg.diag(d) plus rank-one"
    )


def test_scalar_in_diag():
    def bad(S, q, k, v, g: kg.Scalar):
        return kg.diag(kg.exp(g)) @ S + kg.outer(k, v), S.T @ q

    refused(bad, "'diag(exp(g))'", "a scalar multiplies the state directly")


def test_outer_of_a_scalar():
    def bad(S, q, k, beta: kg.Scalar):
        return S + kg.outer(k, beta), S.T @ q

    refused(bad, "kg.outer takes a key vector, then a value vector")


def test_transpose_of_a_vector():
    def bad(S, q, k: kg.Key, v):
        return S + kg.outer(k, v), S.T @ (q * k.T)

    refused(bad, "'k.T'", "Only a matrix has a transpose")


def test_transpose_of_an_argument_whose_role_is_open():
    def bad(S, q, k, v):
        return S + k @ v.T, S.T @ q

    message = refused(bad, "axes do not fit in 'v.T' (", "kg.outer(x, p) for x p^T", "S.T @ q or q @ S")
    assert ": ." not in message


# One token.


@pytest.mark.parametrize("later", [lambda k: k[1], lambda k: k[-1], lambda k: k[0:2]])
def test_a_later_token_by_index(later):
    def bad(S, q, k, v):
        return S + kg.outer(later(k), v), S.T @ q

    refused(bad, "'k[", "a recurrence sees token t alone", "shift the tensor before the op", "kg.Key[2]")


def test_a_later_token_by_attribute():
    def bad(S, q, k, v):
        return S + kg.outer(k.next, v), S.T @ q

    refused(bad, "'k.next': a symbol has no attribute 'next'", "no next or previous token")


def test_a_later_token_by_shift():
    def bad(S, q, k, v):
        return S + kg.outer(kg.shift(k, -1), v), S.T @ q

    refused(bad, "'shift(k)': a recurrence sees token t alone")


def test_unpacking_what_is_no_sequence():
    def bad(S, q, k, v):
        k1, k2 = k
        return S + kg.outer(k1, v), S.T @ q

    refused(bad, "'k' is not a sequence", "kg.Key[2]")


# What is returned.


def test_no_tuple():
    def bad(S, q, k, v):
        return delta(S, k, v)

    refused(bad, "the function returned a Node: expected 'return S, output'")


def test_nothing_returned():
    def bad(S, q, k, v):
        delta(S, k, v)

    refused(bad, "the function returned a NoneType")


def test_three_values():
    def bad(S, q, k, v):
        S = delta(S, k, v)
        return S, S.T @ q, S.T @ k

    refused(bad, "a tuple of 3", "one matrix state and one output", "a normaliser is read by one more value channel")


def test_a_momentum():
    def bad(S, M, q, k, v, eta):
        M = eta * M - kg.outer(k, S.T @ k - v)
        return (S + M, M), S.T @ q

    refused(bad, "the new state is a tuple of 2", "a momentum, is outside the family")


def test_two_states():
    def bad(S, q, k, v):
        return (delta(S, k, v), S), S.T @ q

    refused(bad, "the new state is a tuple of 2", "A recurrence has one matrix state")


def test_a_second_matrix_among_the_arguments():
    def bad(S, M, q, k, v):
        M = 0.9 * M + kg.outer(k, v)
        return S + M, S.T @ q

    refused(bad, "'0.9 * M + outer(k, v)'", "there is one matrix state")


def test_state_not_returned():
    def bad(S, q, k, v):
        return kg.outer(k, v), S.T @ q

    refused(bad, "the first value returned, 'outer(k, v)', does not hold the state")


def test_output_first():
    def bad(S, q, k, v):
        S = delta(S, k, v)
        return S.T @ q, S

    refused(bad, "the new state is", "expected a K x V matrix: return the state, then the output")


def test_output_is_no_value_vector():
    def bad(S, q, k, v):
        S = delta(S, k, v)
        return S, q * k

    refused(bad, "the output is 'q * k'", "expected a value vector", "such as S.T @ q")


def test_output_is_a_number():
    def bad(S, q, k, v):
        return delta(S, k, v), 1.0

    refused(bad, "the output is a float")


def test_previous_state_unused():
    def bad(S, q, k, v):
        return (S - S) + kg.outer(k, v), S.T @ q

    refused(bad, "the previous state does not enter the new one")


# The body.


def test_if():
    def bad(S, q, k, v, beta):
        if beta:
            S = S + kg.outer(k, v)
        return S, S.T @ q

    refused(bad, "the truth of 'beta' was asked for", "the body runs once", "kg.maximum")


def test_comparison():
    def bad(S, q, k, v, beta):
        return S + kg.outer(k, v * (beta > 0)), S.T @ q

    refused(bad, "'beta' was compared with '0'", "kg.maximum or kg.minimum")


@pytest.mark.parametrize("equal", [lambda x: x == 0, lambda x: x != 1.0])
def test_equality(equal):
    def bad(S, q, k, v, beta):
        return (S + kg.outer(k, beta * v) if equal(beta) else S), S.T @ q

    refused(bad, "'beta' was compared with '", "the body runs once")


def test_assignment_in_place():
    def bad(S, q, k, v):
        S[0] = k
        return S, S.T @ q

    refused(bad, "'S[0] = k': nothing is written in place", "S = S + kg.outer(k, v)")


@pytest.mark.parametrize(
    "expression, what",
    [
        (lambda k: kg.gelu(k), "AttributeError at .*module 'kdagen' has no attribute 'gelu'"),
        (lambda k: kk, "NameError at .*name 'kk' is not defined"),  # noqa: F821
        (lambda k: k // 2, "TypeError at .*unsupported operand type"),
        (lambda k: (k, k)[2], "IndexError at .*tuple index out of range"),
        (lambda k: kg.sum(k, -1) * k, "TypeError at .*takes 1 positional argument but 2 were given"),
    ],
)
def test_an_error_of_the_body_s_own(expression, what):
    def bad(S, q, k, v):
        return S + kg.outer(expression(k), v), S.T @ q

    message = refused(bad, f"{__file__}:", "the functions of kdagen (abs, clip, diag")
    assert re.search(f"the body raised {what}", message)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite(number):
    def bad(S, q, k, v, g):
        return kg.exp(kg.maximum(g, number)) * S + kg.outer(k, v), S.T @ q

    refused(bad, f"{number} stands where a finite number was expected", "a gate of -inf when the op is called")


def test_division_by_zero():
    def bad(S, q, k, v):
        return S + kg.outer(k / 0, v), S.T @ q

    refused(bad, "'k / 0' divides by zero")


def test_a_complex_number():
    def bad(S, q, k, v, theta):
        return kg.exp(1j * theta) * S + kg.outer(k, v), S.T @ q

    refused(bad, "a complex stands where a symbol or a number was expected", "the state is real")


def test_a_sequence_as_a_whole():
    def bad(S, q, k: kg.Key[2], v):
        return S + kg.outer(k + q, v), S.T @ q

    refused(bad, "a tuple stands where a symbol or a number was expected", "take one of its items, such as k[0]")


def test_a_default_that_is_no_number():
    def bad(S, q, k, v, g=None):
        return S + kg.outer(g * k, v), S.T @ q

    refused(bad, "a NoneType stands where", "a parameter with a default is a compile-time constant")


@pytest.mark.parametrize("function", [numpy.exp, torch.exp, math.exp, float, numpy.asarray, torch.sigmoid])
def test_functions_of_other_libraries(function):
    def bad(S, q, k, v, g):
        return function(g) * S + kg.outer(k, v), S.T @ q

    refused(bad, "'g' has no value while the recurrence is recorded", "use the functions of kdagen (kg.exp")


def test_a_tensor_in_the_body():
    def bad(S, q, k, v):
        return S + kg.outer(k, torch.ones(3)), S.T @ q

    refused(bad, "a Tensor stands where a symbol or a number was expected", "pass tensors as arguments")


def test_something_else_in_the_body():
    def bad(S, q, k, v):
        return S + kg.outer(k, "v"), S.T @ q

    refused(bad, "a str stands where a symbol or a number was expected", "pass tensors as arguments")


def test_star_arguments():
    def bad(S, *tensors):
        return S, S.T @ tensors[0]

    refused(bad, "'*tensors': arguments must be named one by one")


def test_keyword_arguments():
    def bad(S, q, **options):
        return S, S.T @ q

    refused(bad, "'*options': arguments must be named one by one")


def test_positional_only():
    def bad(S, q, k, v, /):
        return delta(S, k, v), S.T @ q

    refused(bad, "'S' is positional only")


def test_no_arguments():
    def bad():
        return None

    refused(bad, "the function takes nothing: expected the state first")


def test_no_function():
    with pytest.raises(
        kg.RecurrenceError, match="a int was given where a function of the state and inputs was expected"
    ):
        kg.recurrence(3)


def test_lambda():
    with pytest.raises(kg.RecurrenceError, match="'<lambda>': the name must be an identifier: use def"):
        kg.recurrence(lambda S, q, k, v: (delta(S, k, v), S.T @ q))


# Roles.


def test_open_role():
    def bad(S, q, k, v, a, b):
        return kg.diag(kg.exp(a * b)) @ S + kg.outer(k, v), S.T @ q

    refused(
        bad,
        "the role of argument 'a' is open: it is used in 'a * b'",
        "a: kg.Scalar (a scalar) or a: kg.Channel (a key",
    )


def test_contradiction_in_use():
    def bad(S, q, k, v):
        return S + kg.outer(k, v) + kg.outer(v, k), S.T @ q

    refused(bad, "axes do not fit in 'S + outer(k, v) + outer(v, k)'", "'outer(v, k)' is a K x K matrix")


def test_key_and_value_the_wrong_way_round():
    def bad(S, q, k, v):
        return S + kg.outer(v, k), S.T @ q

    refused(
        bad,
        "argument 'k' is a value vector by its use in 'outer(v, k)', but by its name a key vector",
        "kg.outer takes the key, then the value",
        "k: kg.Value",
    )


def test_contradiction_with_an_annotation():
    def bad(S, q, k: kg.Value, v):
        return S + kg.outer(k, v), S.T @ q

    refused(bad, "'k' is a value vector (it is annotated kg.Value)", "kg.outer takes a key vector")


def test_operands_of_two_axes():
    def bad(S, q, k: kg.Key, v: kg.Value):
        return S + kg.outer(k, v), S.T @ q + k * v

    refused(bad, "axes do not fit in 'k * v'", "Operands have the same axis, or one of them is a scalar")


def test_an_argument_as_key_and_value():
    def bad(S, q, k):
        return S + kg.outer(k, k), S.T @ q

    refused(bad, "axes do not fit in 'outer(k, k)'", "one axis, even where K = V: pass the tensor twice")


def test_a_key_taken_from_a_value():
    def bad(S, q, k, v, eta):
        return S - kg.outer(k, eta * (S.T @ k - (v - k))), S.T @ q

    refused(bad, "axes do not fit in", "for both key and value pass the tensor twice, under two names")


def test_unused_argument():
    def bad(S, q, k, v, beta):
        return S + kg.outer(k, v), S.T @ q

    refused(bad, "argument 'beta' is never used")


@pytest.mark.parametrize("nothing", [lambda q, v: 0 * q, lambda q, v: q - q])
def test_an_argument_that_cancels(nothing):
    def bad(S, q, k, v):
        return S + kg.outer(k, v), S.T @ nothing(q, v)

    refused(bad, "nothing depends on q, which cancels or is multiplied by zero: remove it, or use it")


def test_two_arguments_of_one_name():
    def bad(S, q, k: kg.Key[2], k_1, v):
        return S + kg.outer(k[0] + k[1] + k_1, v), S.T @ q

    refused(bad, "two arguments are called k_1")


def test_an_annotation_of_another_kind():
    def bad(S, q, k: int, v):
        return S + kg.outer(k, v), S.T @ q

    refused(bad, "argument 'k' is annotated with <class 'int'>: expected one of kg.Key")


def test_an_annotation_that_is_not_understood():
    def bad(S, q, k: "kg.Keyy", v):  # noqa: F821
        return S + kg.outer(k, v), S.T @ q

    refused(bad, "the annotation 'kg.Keyy' of 'k' is not understood", "has no attribute 'Keyy'")


def test_bounds_the_wrong_way_round():
    with pytest.raises(kg.RecurrenceError, match=r"kg.Channel\(lower=1.0, upper=-1.0\): the bounds are the wrong way"):
        kg.Channel(lower=1.0, upper=-1.0)


@pytest.mark.parametrize("count", [0, -1, True, "n"])
def test_how_many(count):
    with pytest.raises(kg.RecurrenceError, match="expected how many there are, an integer from 1 up"):
        kg.Key[count]


# Decays.


def test_negative_decay():
    def bad(S, q, k, v, g):
        return kg.outer(k, v) - kg.exp(g) * S, S.T @ q

    refused(bad, "the state is multiplied by -exp(g), a negative decay")


def test_decay_that_may_be_negative():
    def bad(S, q, k, v, a):
        return kg.diag(a) @ S + kg.outer(k, v), S.T @ q

    refused(bad, "the state decays by a, which may be negative", "kg.exp(g)", "kg.Channel(lower=0.0, upper=1.0)")


@pytest.mark.parametrize("write", [lambda S, k: S, lambda S, k: S - kg.outer(k, S.T @ k)])
def test_no_value_among_the_arguments(write):
    def bad(S, q, k, g):
        S = kg.exp(g) * S
        return write(S, k), S.T @ (q + k)

    refused(bad, "nothing new is written to the state: expected a value vector among the arguments")


def test_nothing_written_by_a_kernel():
    @kg.recurrence
    def bad(S, q, v, g):
        S = kg.exp(g) * S
        return S, S.T @ q + v

    with pytest.raises(kg.RecurrenceError, match="'bad' writes nothing to its state, .* expected a write, such as"):
        compile_op(bad)


def test_scalar_decay_that_may_be_negative():
    def bad(S, q, k, v, beta):
        return (1 - beta) * S + kg.outer(k, v), S.T @ q

    refused(bad, "the state decays by 1 - beta", "kg.Scalar(lower=0.0, upper=1.0)")


def test_growing_state():
    def bad(S, q, k, v, g):
        return kg.exp(kg.softplus(g)) * S + kg.outer(k, v), S.T @ q

    refused(bad, "the state grows: its log decay is softplus(g), never below 0", "never positive")


def test_sum_of_what_is_the_same_in_each_channel():
    def bad(S, q, k, v):
        return S + kg.outer(k, kg.sum(k / k) * v), S.T @ q

    refused(bad, "the same in each")


# Constants, and finding a recurrence.


def test_unknown_constant():
    with pytest.raises(
        kg.RecurrenceError, match="'kda_bounded' has no constant bound: expected some of lower_bound, sc"
    ):
        kg.zoo.get("kda_bounded").bind(bound=-3.0)


def test_no_constants():
    with pytest.raises(kg.RecurrenceError, match="'kda' has no constant scale: expected some of none"):
        kg.zoo.get("kda").bind(scale=1.0)


def test_unknown_name():
    with pytest.raises(
        kg.RecurrenceError, match="no recurrence 'kdaa' in the zoo: expected one of linear_attention, .*kda"
    ):
        kg.load("kdaa")


@pytest.mark.parametrize("spec", [3, lambda S, q: (S, S.T @ q)])
def test_what_is_no_recurrence(spec):
    with pytest.raises(kg.RecurrenceError, match="was given where a recurrence was expected: a function"):
        kg.compile(spec)


def test_missing_file(tmp_path):
    with pytest.raises(
        kg.RecurrenceError, match=r"there is no file .*absent.py. Expected a name of the zoo, or file.py"
    ):
        kg.load(f"{tmp_path}/absent.py:kda")


SOURCE = """
import kdagen as kg

width = 3

@kg.recurrence
def mine(S, q, k, v):
    S = S + kg.outer(k, v)
    return S, S.T @ q
"""


def written(tmp_path, text, name="mine.py"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_missing_attribute(tmp_path):
    with pytest.raises(kg.RecurrenceError, match=r"mine.py has no 'other'. Recurrences there: mine"):
        kg.load(f"{written(tmp_path, SOURCE)}:other")


def test_attribute_of_another_kind(tmp_path):
    with pytest.raises(kg.RecurrenceError, match=r"'width' in .*mine.py is of type int, not a recurrence"):
        kg.load(f"{written(tmp_path, SOURCE)}:width")


def test_file_without_recurrences(tmp_path):
    with pytest.raises(kg.RecurrenceError, match="has no recurrence. Recurrences there: none: decorate a function"):
        kg.load(str(written(tmp_path, "x = 1")))


def test_file_with_several(tmp_path):
    text = SOURCE + SOURCE.replace("mine", "yours").replace("import kdagen as kg", "")
    with pytest.raises(kg.RecurrenceError, match="has more than one recurrence: name one as file.py:name"):
        kg.load(str(written(tmp_path, text)))


def test_file_that_does_not_run(tmp_path):
    with pytest.raises(kg.RecurrenceError, match="mine.py could not be imported: NameError: name 'undefined'"):
        kg.load(str(written(tmp_path, "undefined")))


def test_file_that_is_not_python(tmp_path):
    with pytest.raises(kg.RecurrenceError, match="is not a python file"):
        kg.load(f"{written(tmp_path, SOURCE, 'mine.txt')}:mine")


def test_an_error_in_a_file_names_the_recurrence(tmp_path):
    text = SOURCE.replace("S = S + kg.outer(k, v)", "S = S * S")
    with pytest.raises(kg.RecurrenceError, match="recurrence 'mine': 'S [*] S' is not linear"):
        kg.load(f"{written(tmp_path, text)}:mine")


def test_unknown_gate_class():
    with pytest.raises(kg.ArgumentError, match="unknown gate class 'wild': expected one of mild, softplus"):
        kg.zoo.sample(canonical(kg.zoo.get("kda")), (1, 2, 1, 4, 4), gate="wild")


def test_reference_without_a_tensor():
    from kdagen.reference import recurrence_reference

    with pytest.raises(kg.ArgumentError, match="no tensor for q, v: expected q, k, v"):
        recurrence_reference(kg.zoo.get("linear_attention"), {"k": torch.zeros(1, 2, 1, 4)})
