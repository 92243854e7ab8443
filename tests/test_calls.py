"""Calls: spelt and read alike, and nothing else is read."""

import pytest

from tml.calls import Call, CallError, read_arguments, read_call


@pytest.mark.parametrize("arguments", [{}, {"colour": "red"}, {"x": 1.5, "of": [1, None], "say": 'a "b" \u00e9'}])
def test_what_is_spelt_is_read(arguments: dict) -> None:
    call = Call(name="light", arguments=arguments)
    assert read_call(call.spelt()) == call


def test_a_call_is_spelt_without_spaces() -> None:
    assert Call(name="light", arguments={"colour": "red"}).spelt() == '{"name":"light","arguments":{"colour":"red"}}'


def test_absent_arguments_are_none() -> None:
    assert read_call('{"name":"delegate"}') == Call(name="delegate")


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"name":"draw","arguments":{"shape":"cir', "not JSON"),
        ("[]", "needs a name"),
        ("3", "needs a name"),
        ('{"name": 3}', "needs a name"),
        ('{"name":"x","arguments":[]}', "must be an object"),
    ],
)
def test_what_is_no_call_is_refused(payload: str, reason: str) -> None:
    with pytest.raises(CallError, match=reason):
        read_call(payload)


def test_arguments_alone_are_read_alike() -> None:
    assert read_arguments('{"x": 1}') == {"x": 1}
    assert read_arguments(" ") == {}
    with pytest.raises(CallError, match="must be an object"):
        read_arguments("[1]")
    with pytest.raises(CallError, match="not JSON"):
        read_arguments('{"x": ')
