"""The time of day, in any time zone."""

import datetime
import zoneinfo


def time_in(zone: str, now: datetime.datetime) -> str:
    """A moment on the clocks of a time zone, as `Friday 2026-11-27 14:05:09 UTC+01:00`.

    Args:
        zone: a name of the IANA database, such as Europe/Berlin; UTC is always there.
        now: the moment, with a zone of its own.

    Raises:
        ValueError: there is no such zone.
    """
    try:
        place: datetime.tzinfo = datetime.UTC if zone == "UTC" else zoneinfo.ZoneInfo(zone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f"there is no time zone {zone!r}; name one as in Europe/Berlin, or UTC") from error
    there = now.astimezone(place)
    offset = there.strftime("%z")
    return f"{there:%A %Y-%m-%d %H:%M:%S} UTC{offset[:3]}:{offset[3:5]}"
