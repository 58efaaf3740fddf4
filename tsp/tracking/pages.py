"""MLflow's searches give a page at a time; here all of them."""

from collections.abc import Callable, Iterator
from typing import Any


def search_pages(search: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Any]:
    """All that one of the client's searches finds, page by page."""
    token = None
    while True:
        page = search(*arguments, **options, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
