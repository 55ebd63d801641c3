"""Segments of GPU memory grow, unless the user says otherwise."""

from __future__ import annotations

import pytest

from qwen_dist.train.allocator import VARIABLES, let_segments_grow


def test_segments_grow():
    environ: dict[str, str] = {}
    let_segments_grow(environ)
    assert environ == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", VARIABLES)
def test_the_users_own_setting_stays(name):
    environ = {name: "max_split_size_mb:512"}
    let_segments_grow(environ)
    assert environ == {name: "max_split_size_mb:512"}
