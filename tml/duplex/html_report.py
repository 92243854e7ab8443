"""The report of the duplex suite as one HTML file that needs no other: tables, timelines, and sound to play."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape

import numpy as np
import soundfile

from tml.codec.waveform import decode_clip, encode_clip
from tml.duplex.controls import without
from tml.duplex.player import Played, Player
from tml.duplex.scores import BARS, HEADLINES, LOW_IS_GOOD, is_good, judged
from tml.duplex.session_svg import session_svg
from tml.duplex.suite import SuiteReport, cell, latency_cell, sessions_by_behaviour
from tml.microturn import Clock
from tml.session import Behaviour, Session, Stream, TextEvent

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;color:#20242b;margin:24px auto;max-width:1500px;padding:0 20px}
h1{font-size:22px}h2{font-size:18px;margin-top:34px}h3{font-size:14px;margin:18px 0 4px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:3px 10px;text-align:left;
border-bottom:1px solid #e2e5ea;white-space:nowrap}th{background:#f5f6f8}td.low{color:#7a7f87}
.yes{color:#2d7d46;font-weight:600}.no{color:#c0392b;font-weight:600}small{color:#69707a;font-size:12px}
.wide{overflow-x:auto}svg.session{background:#fff;border:1px solid #e2e5ea;cursor:pointer;
font:11px system-ui,sans-serif}
svg .tick{stroke:#e4e6eb;stroke-width:.6}svg .second{stroke:#c9ccd3;stroke-width:.8}svg .axis{fill:#69707a}
svg .lane{font-weight:600}svg image{image-rendering:pixelated}svg .cursor{stroke:#d01c1c;stroke-width:1.5}
audio{height:32px;margin:4px 0;display:block}
"""

_SCRIPT = """
for (const figure of document.querySelectorAll("figure")) {
  const audio = figure.querySelector("audio"), svg = figure.querySelector("svg");
  const cursor = svg.querySelector(".cursor"), left = +svg.dataset.left, scale = +svg.dataset.scale;
  const show = () => {
    cursor.setAttribute("x1", left + audio.currentTime * scale);
    cursor.setAttribute("x2", left + audio.currentTime * scale);
    if (!audio.paused) requestAnimationFrame(show);
  };
  audio.addEventListener("play", show);
  audio.addEventListener("seeked", show);
  svg.addEventListener("click", event => {
    audio.currentTime = Math.max(0, (event.clientX - svg.getBoundingClientRect().left - left) / scale);
  });
}
"""


def html_report(report: SuiteReport, player: Player, facts: Mapping[str, str], pictures: int) -> str:
    """The whole page.

    Args:
        report: what the suite found.
        player: the model, which knows how its own audio sounds.
        facts: what the page says at its top, by name: the model, the data.
        pictures: sessions of each behaviour that are drawn, the first ones, with their sound.
    """
    said = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Duplex suite</title>',
        f"<style>{_STYLE}</style></head><body><h1>Duplex suite</h1><table>{said}</table>",
        "<h2>Every number beside its controls</h2>",
        "<p>Share of cases with its 95 % interval. The first metric of a behaviour is the one it is about: learnt "
        "means that its interval lies clear of those of all controls. The ceiling is what the recorded targets "
        "score.</p>",
        f'<div class="wide">{_table(report)}</div>',
    ]
    for behaviour, numbers in sessions_by_behaviour(report.sessions).items():
        parts.append(f'<h2 id="{behaviour.value}">{_words(behaviour.value)}</h2>{_tags(report, behaviour)}')
        parts += [_figure(report, player, number) for number in numbers[:pictures]]
    parts.append(f"<script>{_SCRIPT}</script></body></html>")
    return "\n".join(parts) + "\n"


def _words(name: str) -> str:
    return escape(name.replace("_", " "))


def _table(report: SuiteReport) -> str:
    """A row a headline of each behaviour, a column a control."""
    controls = list(report.controls)
    columns = ("behaviour", "n", "metric", "model", *(c.value for c in controls), "ceiling", "latency", "bar", "learnt")
    rows = ["<tr>" + "".join(f"<th>{_words(name)}</th>" for name in columns) + "</tr>"]
    for behaviour, found in report.scores.items():
        for place, metric in enumerate(HEADLINES[behaviour]):
            rates = report.control_rates(behaviour, metric)
            bars = [
                bar
                for bar in BARS.get(behaviour, ())
                if bar.metric == metric or (not place and bar.metric == "latency_s")
            ]
            reached = " ".join(
                f'<span class="{"yes" if found.reaches(bar) else "no"}">{bar.value:g}</span>' for bar in bars
            )
            link = f'<a href="#{behaviour.value}">{_words(behaviour.value)}</a>'
            learnt = {True: '<span class="yes">yes</span>', False: '<span class="no">no</span>', None: "-"}
            cells = (
                "" if place else link,
                "" if place else str(found.num_sessions),
                _words(metric) + (" <small>low is good</small>" if metric in LOW_IS_GOOD else ""),
                f"<b>{cell(found.rate(metric))}</b>",
                *(cell(rates[control]) if control in rates else "-" for control in controls),
                cell(report.ceiling[behaviour].rate(metric), interval=False),
                latency_cell(found, metric),
                reached,
                "" if place else learnt[report.is_learnt(behaviour)],
            )
            rows.append("<tr>" + "".join(f"<td>{text}</td>" for text in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _tags(report: SuiteReport, behaviour: Behaviour) -> str:
    """The metric that a behaviour is about, by what its expectations are tagged with."""
    by_tag = report.scores[behaviour].by_tag
    found = ", ".join(f"{escape(tag) or 'untagged'} {cell(rate)}" for tag, rate in by_tag.items())
    return f"<p><small>{_words(HEADLINES[behaviour][0])}: {found}</small></p>" if found else ""


def _figure(report: SuiteReport, player: Player, number: int) -> str:
    """One session: its timeline and its sound, the user on the left and the model on the right."""
    session, played = report.sessions[number], report.played[number]
    own = player.own_sound(session, played) if player.model.has_voice else None
    shown = as_played(session, played, player.layout.clock, own)
    found = judged(session, report.traces[number])
    good = sum(all(map(is_good, came)) for _, came in found)
    facts = ", ".join(f"{key} {value}" for key, value in session.meta.items() if value)
    drawn = session_svg(shown, session, found, player.layout.clock)
    return (
        f"<figure><h3>{escape(session.session_id)}: {good} of {len(found)} expectations met</h3>"
        f"<small>{escape(facts)}</small>"
        f'<audio controls preload="metadata" src="{_sound(session, own)}"></audio>'
        f'<div class="wide">{drawn}</div></figure>'
    )


def as_played(session: Session, played: Played, clock: Clock, own: np.ndarray | None) -> Session:
    """The session as it went: the model's own words, calls and sound, and the results that came in.

    Args:
        session: of the data set.
        played: what the model did.
        clock: of the micro-turns.
        own: the model's sound, at the session's rate; None without a voice.
    """
    rate, length = session.sample_rate_hz, session.num_samples
    turn = clock.turn_samples * rate // clock.sample_rate_hz
    texts = list(played.background)
    for said in played.said:
        start = round(said.emitted_s * rate)
        if start >= length:
            continue
        if said.text.strip():
            end = min(start + turn, length)
            texts.append(TextEvent(stream=Stream.OWN_TEXT, start=start, end=end, text=said.text.strip()))
        texts += [TextEvent(stream=Stream.ACTION, start=start, end=start, text=call) for call in said.actions]
    rest = without(session, Stream.OWN_TEXT, Stream.OWN_AUDIO, Stream.ACTION, Stream.BACKGROUND)
    sounds = {} if own is None else {Stream.OWN_AUDIO: encode_clip(own, rate)}
    return replace(
        rest,
        streams=tuple(dict.fromkeys((*rest.streams, *sounds, *(event.stream for event in texts)))),
        audio={**rest.audio, **sounds},
        texts=tuple(sorted((*rest.texts, *texts), key=lambda event: event.start)),
    )


def _sound(session: Session, own: np.ndarray | None) -> str:
    """The user's sound, and the model's beside it if it has a voice, as FLAC in a data URI."""
    clip, rate = session.audio.get(Stream.USER_AUDIO), session.sample_rate_hz
    user = np.zeros(session.num_samples, np.float32) if clip is None else decode_clip(clip, rate)
    channels: Sequence[np.ndarray] = [user] if own is None else [user, own]
    file = io.BytesIO()
    soundfile.write(file, np.clip(np.stack(channels, axis=1), -1, 1), rate, format="FLAC", subtype="PCM_16")
    return f"data:audio/flac;base64,{base64.b64encode(file.getvalue()).decode()}"
