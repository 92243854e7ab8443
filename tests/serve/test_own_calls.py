"""Tools that the model calls itself, in real tool servers that answer, refuse, hang or die."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from local_servers import WAIT_S, all_said, odd_tools, running_tool_server, tool_server, wait_until
from test_background import DELEGATE, background, conversation

from tml.calls import Call, CallError
from tml.serve.background import Background, Limits
from tml.serve.toolbox import check_arguments


@pytest.fixture(scope="module")
def tools_alone() -> Iterator[Background]:
    """Tools and no worker, for many tests: a server takes seconds to start."""
    with background(None, tools=(tool_server(),)) as behind:
        yield behind


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ('{"name":"calculator","arguments":{"expr', "failed: not JSON"),
        ("it is seven", "failed: not JSON"),
        ('{"name":3}', "failed: a call needs a name"),
        (r'{"name":"calculator","arguments":{"expression":"\ud83d"}}', "failed: not JSON"),
        ('{"name":"teleport"}', "failed: there is no tool teleport"),
        ('{"name":"calculator","arguments":{"expression":6}}', "failed: calculator: expression 6 is not of type"),
        ('{"name":"calculator"}', "failed: calculator: 'expression' is a required property"),
        ('{"name":"delegate","arguments":{"query":"bread"}}', "failed: delegate: Additional properties are not"),
        ('{"name":"cancel","arguments":{"task":"one"}}', "failed: cancel: task 'one' is not of type 'integer'"),
        (DELEGATE, "failed: there is no background model"),
    ],
)
def test_a_call_that_cannot_be_carried_out_comes_back_as_a_failure(
    tools_alone: Background, payload: str, reason: str
) -> None:
    tools_alone.act(payload, conversation)
    [said] = tools_alone.take_all()
    assert said.startswith(reason)
    assert tools_alone.num_in_flight == 0
    assert tools_alone.notices[-1].startswith("refused ")
    tools_alone.act('{"name":"calculator","arguments":{"expression":"1+1"}}', conversation)
    assert all_said(tools_alone) == ["calculator result 2"]


@pytest.mark.parametrize("schema", [{"properties": {"x": {"$ref": "https://example.org/x"}}}, {"$ref": "#"}], ids=str)
def test_a_schema_that_leads_nowhere_fails_the_call_and_nothing_else(schema: dict) -> None:
    with pytest.raises(CallError, match="odd: its schema refers to what is not there"):
        check_arguments(Call(name="odd", arguments={"x": 1}), schema)


def test_the_model_calls_every_tool_itself(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "bread.md").write_text("The price of bread is five.")
    canvas = tmp_path / "canvas.svg"
    with background(None, tools=(tool_server(f"--documents={tmp_path}/texts", f"--canvas={canvas}"),)) as behind:

        def called(name: str, **arguments) -> list[str]:
            behind.act(Call(name=name, arguments=arguments).spelt(), conversation)
            return all_said(behind)

        assert called("search", query="price bread") == ["search result bread: The price of bread is five."]
        assert called("draw", shape="circle") == ["draw result drew a black circle at 320, 240"]
        assert '<circle cx="320" cy="240" r="50" fill="black" />' in canvas.read_text()
        assert called("draw", shape="star")[0].startswith("failed: draw: shape 'star' is not one of")
        assert called("calculator", expression="1/0")[0].startswith("calculator failed: Error executing")
        assert called("time")[0].endswith("UTC+00:00")
        assert called("cancel") == []
        assert behind.notices[-1] == "there was nothing in flight to cancel"


def test_the_tools_of_a_server_that_stays_are_called_over_http() -> None:
    with running_tool_server() as address:
        with background(None, tools=(address,)) as behind:
            behind.act(Call(name="calculator", arguments={"expression": "6*7"}).spelt(), conversation)
            assert all_said(behind) == ["calculator result 42"]
            behind.act(Call(name="calculator", arguments={"expression": "1/0"}).spelt(), conversation)
            assert all_said(behind)[0].startswith("calculator failed: Error executing")
        with background(None, tools=(address,)) as behind:
            behind.act(Call(name="time").spelt(), conversation)
            assert all_said(behind)[0].endswith("UTC+00:00")
    with pytest.raises(ValueError, match=f"{address}' does not start: "):
        Background((address,), limits=Limits(start_timeout_s=WAIT_S))


def test_a_tool_server_that_dies_or_hangs_harms_nobody_else() -> None:
    with background(None, tools=(odd_tools(), tool_server()), timeout_s=5.0, max_tool_calls=1) as behind:
        for name, reason in (("hang", "hang failed: no result in 5 s"), ("die", "die failed: ")):
            behind.act(Call(name=name).spelt(), conversation)
            behind.act(Call(name="die").spelt(), conversation)
            assert behind.take_all() == ["failed: die: 1 calls in flight already"]
            [said] = all_said(behind)
            assert said.startswith(reason)
        behind.act(Call(name="die").spelt(), conversation)
        assert all_said(behind)[0].startswith("die failed: ")
        calculation = Call(name="calculator", arguments={"expression": "2^10"}).spelt()

        def again() -> bool:
            behind.act(calculation, conversation)
            return all_said(behind) == ["calculator result 1024"]

        wait_until(again)


def test_a_tool_that_says_nothing_puts_nothing_into_the_stream() -> None:
    with background(None, tools=(odd_tools(),)) as behind:
        behind.act(Call(name="light", arguments={"colour": "red"}).spelt(), conversation)
        assert all_said(behind) == []
        assert behind.notices == []


@pytest.mark.parametrize(
    ("servers", "reason"),
    [
        (("no-such-command",), "'no-such-command' does not start: "),
        (("true",), "'true' does not start: "),
        ((odd_tools(), odd_tools()), "has a tool 'die', but there is one already"),
        (("",), "needs a command or an http address"),
    ],
)
def test_a_tool_server_that_cannot_be_had_is_an_error_at_once(servers: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Background(servers, limits=Limits(start_timeout_s=WAIT_S))
