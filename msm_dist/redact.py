"""Text without its secrets and without what steers a terminal: what messages, logs and saved settings may hold.

In: any text. Out: the same, with passwords, tokens and signatures replaced by "...", and control characters escaped.
Recognised are user information and queries of URLs, signed parameters, headers of authorization and the password
options of the usual commands; a secret in another form is not. What begins with $ names an environment variable and is
no secret. Nothing fails.
"""

import re

LITERAL = r"(?![\"']?\$)"
"""Not a variable, whose value the shell puts in."""
USER = re.compile(rf"(?P<kept>[A-Za-z][A-Za-z0-9+.-]*:/{{1,2}}){LITERAL}[^\s/@?#]+(?P<behind>@)(?=[^\s/])")
PASSWORD = re.compile(
    rf"(?P<kept>[A-Za-z][A-Za-z0-9+.-]*:/{{1,2}}){LITERAL}[^\s/@?#:\[]+:(?!\d+/)[^\s\"']*(?P<behind>@)(?=[^\s/])"
)
"""Beside USER one with any sign in it: AWS's hold slashes. A number and a slash are a port and a path."""
QUERY = re.compile(r"(?P<kept>[A-Za-z][A-Za-z0-9+.-]*://[^\s?#\"'<>]*\?)[^\s\"'<>)]+")
WORD = "signature|token|secret|password|passwd|credential|api[-_]?key|access[-_]?key"
WORDS = "SIGNATURE|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY"
NAME = rf"(?:[A-Za-z0-9_-]*(?:{WORD})[A-Za-z0-9_-]*|sig)"
PARAMETER = re.compile(rf"(?P<kept>[?&;](?:{NAME}|key|auth)=){LITERAL}[^\s&\"']+", re.IGNORECASE)
OPTION = re.compile(rf"(?P<kept>(?<![\w-])--?{NAME}[ =]){LITERAL}[^\s]+", re.IGNORECASE)
VARIABLE = re.compile(rf"(?P<kept>(?<![\w$-])[A-Z0-9_]*(?:{WORDS})[A-Z0-9_]*=){LITERAL}\S+")
LOGIN = re.compile(rf"(?P<kept>(?<!\S)(?:-u|--user|--proxy-user)[ =]?){LITERAL}[\"']?[^\s:$]+:(?!\$)[^\s\"']+")
HEADER = re.compile(
    r"(?P<kept>\b(?:(?:proxy-)?authorization|cookie|[\w-]*(?:token|api-key))\s*:\s*+(?:(?:bearer|basic|digest|token)\s+)?+)"
    rf"{LITERAL}(?!\.\.\.)[^\s\"']+",
    re.IGNORECASE,
)
IN_COMMANDS = (PASSWORD, USER, PARAMETER, OPTION, VARIABLE, LOGIN, HEADER)
STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def redacted(text: str) -> str:
    """Text without secrets, control characters escaped; line ends and tabs stay."""
    for pattern in (*IN_COMMANDS, QUERY):
        text = pattern.sub(_shortened, text)
    return STEERS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def holds_secret(text: str) -> bool:
    """Whether a location or command holds what must not be kept: a password, a token, a signature.

    A URL's query is one, as no file of ours needs any; that of a URL inside a command may be harmless.
    """
    patterns = IN_COMMANDS if text.startswith("pipe:") else (*IN_COMMANDS, QUERY)
    return any(found[0] != _shortened(found) for pattern in patterns for found in pattern.finditer(text))


def has_password(url: str) -> bool:
    """Whether a URL has a user and a password before its server, whatever signs are in it."""
    return PASSWORD.match(url) is not None


def _shortened(found: re.Match[str]) -> str:
    return f"{found['kept']}...{found.groupdict().get('behind') or ''}"
