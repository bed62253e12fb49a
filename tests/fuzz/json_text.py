"""JSON documents that are nearly right, as text: a strategy for fuzzers of files."""

import json

from hypothesis import strategies as st

# Text that json.dumps would not write, or not in time.
_RAW = [
    "[" * 10**5,
    '{"a":' * 10**5,
    "1" * 5000,
    "-" + "9" * 400,
    "1e999",
    "NaN",
    "-Infinity",
    '"\\ud83d"',
    '"\\u0000"',
    "",
]
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([0, -1, 10**12, 2**31, 2**63, 2**64, 0.0, 0.5, -0.0, 1e-320, 1e308]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["64", "four", "", "../x", "/etc/passwd", "x" * 5000, "\n", "\0"]),
)
values = st.recursive(_LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


def _paths(document, path=()):
    yield path
    if isinstance(document, dict):
        for key, value in document.items():
            yield from _paths(value, (*path, key))
    elif isinstance(document, list):
        for place, value in enumerate(document):
            yield from _paths(value, (*path, place))


@st.composite
def nearly(draw, document: dict, extra: tuple[str, ...] = ()) -> bytes:
    """`document` with one to three values replaced, removed or added (`extra`: names of keys); sometimes cut short."""
    text = json.dumps(document)
    for _ in range(draw(st.integers(1, 3))):
        try:
            changed = json.loads(text)
        except (ValueError, RecursionError):
            break
        paths = [*_paths(changed), *((key,) for key in extra if isinstance(changed, dict))]
        text = _changed(changed, draw(st.sampled_from(paths)), draw)
    content = text.encode()
    if draw(st.integers(0, 9)) == 0:
        content = content[: draw(st.integers(0, len(content)))]
    return b"\xff" + content if draw(st.integers(0, 30)) == 0 else content


def _changed(document, path: tuple, draw) -> str:
    if not path:
        return draw(st.sampled_from(_RAW) | values.map(json.dumps))
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    action = draw(st.sampled_from(["replace", "replace", "raw", "remove"]))
    if action == "remove":
        if isinstance(parent, dict):
            parent.pop(path[-1], None)
        else:
            del parent[path[-1]]
        return json.dumps(document)
    mark = "the value to come"
    parent[path[-1]] = mark if action == "raw" else draw(values)
    return json.dumps(document).replace(f'"{mark}"', draw(st.sampled_from(_RAW)) if action == "raw" else "")
