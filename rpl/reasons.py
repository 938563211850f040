"""Why a picture was not used: the closed list of reasons, each with its stage, its kind and a sentence for a person.

The words are what tables, facts and the report count by. Knows nothing of how a reason is found: `rpl.fetch`,
`rpl.images`, `rpl.download` and `rpl.curation` find them.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

Stage = Literal["fetch", "picture", "curate"]
"""Where it shows: at the connection and the answer, in the bytes as a picture, beside the other pictures."""

Kind = Literal["failed", "refused"]
"""failed: the web would not give it, another day may differ; refused: we would not take it."""


class Reason(str, Enum):
    """One reason; equal to its word as text."""

    stage: Stage
    kind: Kind
    sentence: str

    def __new__(cls, word: str, stage: Stage, kind: Kind, sentence: str) -> Reason:
        member = str.__new__(cls, word)
        member._value_ = word
        member.stage, member.kind, member.sentence = stage, kind, sentence
        return member

    def __str__(self) -> str:
        return str(self.value)

    UNKNOWN_HOST = "unknown_host", "fetch", "failed", "The host's name is not known."
    NO_CONNECTION = "no_connection", "fetch", "failed", "No connection was made, or it broke off."
    TLS_FAILED = "tls_failed", "fetch", "failed", "The server's certificate or encryption is not valid."
    TIMED_OUT = "timed_out", "fetch", "failed", "The whole answer did not come within the time allowed."
    NOT_FOUND = "not_found", "fetch", "failed", "The server has no such picture (404 or 410)."
    DENIED = "denied", "fetch", "failed", "The server does not give it to us (another 4xx status)."
    SERVER_ERROR = "server_error", "fetch", "failed", "The server failed or was busy at every try (5xx or 429)."
    BAD_RESPONSE = "bad_response", "fetch", "failed", "The answer is not one that HTTP allows here."

    BAD_URL = "bad_url", "fetch", "refused", "Not the http or https address of a host."
    FORBIDDEN_PORT = "forbidden_port", "fetch", "refused", "The address names another port than 80 or 443."
    PRIVATE_ADDRESS = "private_address", "fetch", "refused", "The host or a redirect leads into a private network."
    TOO_MANY_REDIRECTS = "too_many_redirects", "fetch", "refused", "One redirect after the other."
    TOO_LARGE = "too_large", "fetch", "refused", "More bytes than allowed."
    OPTED_OUT = "opted_out", "fetch", "refused", "The server asks not to use it (X-Robots-Tag)."
    WRONG_TYPE = "wrong_type", "fetch", "refused", "The server declares another content type than a picture's."

    NOT_AN_IMAGE = "not_an_image", "picture", "refused", "A page or another file, not a picture in a known format."
    DAMAGED_IMAGE = "damaged_image", "picture", "refused", "A picture file that is cut off or damaged."
    TOO_MANY_PIXELS = "too_many_pixels", "picture", "refused", "More pixels than allowed, told before decoding."
    TOO_SMALL = "too_small", "picture", "refused", "The shorter side has too few pixels."
    TOO_ELONGATED = "too_elongated", "picture", "refused", "One side is too many times the other."

    PLACEHOLDER = "placeholder", "curate", "refused", "The same bytes came from many addresses."
    LOW_SCORE = "low_score", "curate", "refused", "The picture itself resembles its category too little."
    DUPLICATE = "duplicate", "curate", "refused", "A copy of a better-ranked picture of the category."
    DUPLICATE_ELSEWHERE = (
        "duplicate_elsewhere", "curate", "refused", "A copy of a picture that suits another category better.",
    )  # fmt: skip


BY_WORD: dict[str, Reason] = {reason.value: reason for reason in Reason}


class Refused(Exception):
    """One picture is not taken; caught per picture, never the end of a stage.

    Attributes:
        reason: the word to count by.
        detail: a clause for a person; holds nothing of a body.
        may_pass: trying the same address again at once may help.
    """

    def __init__(self, reason: Reason, detail: str, *, may_pass: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.may_pass = may_pass
