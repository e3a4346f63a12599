"""Bodies of requests."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StrictInt

Ids = list[StrictInt]
NEEDED = {  # what a parameter takes, in words
    "input": "a text, a list of texts, a list of token ids, or a list of such lists",
    "model": "the name of the model",
    "encoding_format": "float or base64",
    "dimensions": "a whole number of 1 or more",
    **dict.fromkeys(("query", "first", "second"), "a text or a list of texts"),
    "k": "a whole number from 1 to 1000",
    "text": "a text",
    "row": "the number of a row",
    "rows": "numbers of rows, with commas between them,",
    "number": "the number of a model",
    "run": "the name of a run",
}


class EmbeddingsRequest(BaseModel):
    """OpenAI's request: ``input`` is a text or its token ids, or a list of either. Other keys are ignored."""

    input: str | Ids | list[str] | list[Ids]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None


class SearchRequest(BaseModel):
    """Texts to search for, and how many rows are wanted for each."""

    query: str | list[str]
    k: Annotated[StrictInt, Field(ge=1, le=1000)] = 10


class SimilarityRequest(BaseModel):
    """Texts to compare, each of ``first`` with each of ``second``."""

    first: str | list[str]
    second: str | list[str]
