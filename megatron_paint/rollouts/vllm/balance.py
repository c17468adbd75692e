"""Which server gets which prompts."""

import heapq
from collections.abc import Mapping

from megatron_paint.rollouts.engine import GenerationRequest


def balanced(requests: Mapping[int, GenerationRequest], servers: int, *, response: int) -> list[list[int]]:
    """The numbers of the requests of each server, the longest first; the work of the servers is about the same.

    Requests with the same prompt stay together, because a server computes a prompt once. response: most tokens of a
    response. The work of a request is its tokens, those of the prompt counted once for each server.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, request in requests.items():
        groups.setdefault(request.prompt_ids, []).append(number)
    share = -(-len(requests) // servers)  # a group that is more than one server's share is divided
    pieces = [
        (len(prompt) + response * len(part), part)
        for prompt, members in groups.items()
        for part in (members[start : start + share] for start in range(0, len(members), share))
    ]
    loads = [(0, server) for server in range(servers)]
    found: list[list[int]] = [[] for _ in range(servers)]
    for work, part in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        load, server = heapq.heappop(loads)
        found[server] += part
        heapq.heappush(loads, (load + work, server))
    return found
