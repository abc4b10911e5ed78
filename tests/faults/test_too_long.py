"""Times that an entry cannot hold are refused at decoration."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

import memo


@pytest.mark.parametrize("ttl", [10**10, timedelta.max])
def test_a_ttl_that_no_entry_can_hold(ttl: Any) -> None:
    """A ttl past what the format holds is an error at decoration that names it."""
    with pytest.raises(memo.OptionError, match="ttl"):
        memo.cache(ttl=ttl)(lambda: 1)
