"""POST /v1/moderations, by OpenAI's own client."""

from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from openai.types import ModerationImageURLInputParam, ModerationTextInputParam

from guard.policy.compile import Category, Policy, Threshold
from guard.policy.store import PolicyStore
from guard.service.http.openai_moderations import MAPPING, found_hazards
from guard.types import HAZARDS, Action, Coverage, Lane, Role, Scores, Verdict, Violation
from tests.conftest import Running, Serve, Service
from tests.stand_ins import POLICY


def client_of(service: Running, token: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=token, max_retries=0)


@pytest.fixture
async def client(service: Service) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(service) as client:
        yield client


async def test_openais_client_takes_the_answer(client: openai.AsyncOpenAI) -> None:
    """A result for each text in its order; the model is named with its revision, and every category is there."""
    answer = await client.moderations.create(input=["Hi!", "attack"], model="omni-moderation-latest")
    assert answer.id.startswith("modr-decision-")
    assert answer.model == "words@00ff"
    assert [result.flagged for result in answer.results] == [False, True]
    for result in answer.results:
        for told in (result.categories, result.category_scores, result.category_applied_input_types):
            assert told.model_dump(by_alias=True).keys() == MAPPING.keys()
        assert result.category_scores.harassment == 0.25
        assert result.category_scores.hate == 0  # not scored by this model
        assert result.category_applied_input_types.sexual_minors == ["text"]


async def test_the_embedded_model_tells_categories(embedded: Running) -> None:
    """A harmless text is of none; an insult is harassment, and nothing about children."""
    texts = ["How do I bake bread?", "You worthless pig, everybody here hates you and laughs at your stupid face."]
    async with client_of(embedded) as client:
        harmless, insult = (await client.moderations.create(input=texts)).results
    assert not harmless.flagged
    assert not any(harmless.categories.model_dump().values())
    assert insult.flagged
    assert insult.categories.harassment
    assert insult.category_scores.harassment > 0.5 > harmless.category_scores.harassment
    assert not insult.categories.sexual_minors


async def test_the_parts_of_one_text_are_one_input(client: openai.AsyncOpenAI) -> None:
    """They are read as lines of it."""
    parts: list[ModerationTextInputParam] = [{"type": "text", "text": text} for text in ("my address", "attack")]
    answer = await client.moderations.create(input=parts)
    assert [result.flagged for result in answer.results] == [True]


async def test_an_image_is_refused_in_openais_words(client: openai.AsyncOpenAI) -> None:
    """Better than to pass over what cannot be judged."""
    image: ModerationImageURLInputParam = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    with pytest.raises(openai.BadRequestError) as raised:
        await client.moderations.create(input=[image])
    assert raised.value.body == {
        "message": "input[0]: is an image, and only text can be judged",
        "type": "invalid_request_error",
        "param": "input[0]",
        "code": "input_error",
    }


async def test_a_model_may_be_the_name_of_a_policy(client: openai.AsyncOpenAI) -> None:
    """Any other name stands for the default policy."""
    for model, flagged in (("lenient", False), ("default", True), ("text-moderation-latest", True)):
        answer = await client.moderations.create(input="attack", model=model)
        assert answer.results[0].flagged is flagged


async def test_a_verdict_without_scores_flags_as_on_error_says(client: openai.AsyncOpenAI) -> None:
    """The scores are 0, and no category is true."""
    (result,) = (await client.moderations.create(input="broken")).results
    assert result.flagged
    assert set(result.category_scores.model_dump().values()) == {0.0}
    assert not any(result.categories.model_dump().values())


async def test_many_texts_are_bulk_work(client: openai.AsyncOpenAI, service: Service) -> None:
    """They wait where a few would be refused, and all are with the engine at once."""
    await client.moderations.create(input=["Hi!"] * 16)
    assert set(service.judge.lanes) == {Lane.INTERACTIVE}
    await client.moderations.create(input=["Hi!"] * 17)
    assert set(service.judge.lanes[16:]) == {Lane.BULK}


async def test_no_more_texts_than_turns_are_taken(serve: Serve) -> None:
    """By the setting max_turns."""
    async with serve(max_turns=2) as service, client_of(service) as client:
        await client.moderations.create(input=["a", "b"])
        with pytest.raises(openai.BadRequestError, match="3 texts, at most 2 are taken"):
            await client.moderations.create(input=["a", "b", "c"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "request: Invalid JSON: EOF while parsing an object at line 1 column 1"),
        ("{}", "input: Field required"),
        ('{"input": []}', "input: has none of the forms that it may have"),
        ('{"input": 5}', "input: has none of the forms that it may have"),
        ('{"input": "a", "model": 5}', "model: Input should be a valid string"),
        (r'{"input": "\ud800"}', "request: Invalid JSON: unexpected end of hex escape at line 1 column 18"),
    ],
)
async def test_what_is_no_request_is_told_by_its_place(service: Service, body: str, message: str) -> None:
    """And in words that quote none of it."""
    async with httpx.AsyncClient() as session:
        answer = await session.post(f"{service.url}/v1/moderations", content=body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)


def test_the_mapping_knows_guards_hazards() -> None:
    """And no others; each group is there for something."""
    codes = {code for groups in MAPPING.values() for group in groups for code in group}
    assert codes <= HAZARDS.keys()
    assert all(groups and all(groups) for groups in MAPPING.values())


@pytest.mark.parametrize(
    ("violation", "scores", "found"),
    [
        (Violation("both", Action.FLAG, 0.6, 0.5), {"S1": 0.6, "S10": 0.2}, {"S1"}),
        (Violation("both", Action.FLAG, 0.6, 0.5), {"S1": 0.6, "S10": 0.5}, {"S1", "S10"}),
        (Violation("both", Action.FLAG, 0.6, 0.5), {"S1": 0.3, "S10": 0.4}, {"S10"}),
        (Violation("both", Action.BLOCK, rule="words"), {"S1": 0.0, "S10": 0.0}, {"S1", "S10"}),
        (Violation("", Action.BLOCK, rule="words"), {"S1": 0.9, "S10": 0.9}, set()),
        (Violation("unsafe", Action.BLOCK, 0.9, 0.5), {"S1": 0.9, "S10": 0.9}, set()),
    ],
)
def test_found_are_the_hazards_that_reach_the_threshold(
    violation: Violation, scores: dict[str, float], found: set[str]
) -> None:
    """Or the highest, where it takes several to reach it; of a rule all that its category is made of."""
    thresholds = {Role.USER: (Threshold(Action.FLAG, 0.5),)}
    both = Category("both", "Both", ("S1", "S10"), thresholds)
    policy = Policy("p", "r", "", (both, *POLICY.categories), POLICY.on_error)
    verdict = Verdict(0, violation.action, (violation,), Scores(0.9, scores), Coverage(1, 1))
    assert found_hazards(verdict, policy) == found


async def test_what_needs_two_hazards_needs_both(service: Service) -> None:
    """hate/threatening is hate and violence: its score is the lower of the two."""
    thresholds = {Role.USER: (Threshold(Action.FLAG, 0.1),)}
    harassment = Policy("p", "r", "", (Category("h", "H", ("X1",), thresholds),), POLICY.on_error)
    service.judge.policies = PolicyStore([harassment], "p")
    async with client_of(service) as client:
        (result,) = (await client.moderations.create(input="Hi!")).results
    assert result.flagged
    assert (result.categories.harassment, result.categories.harassment_threatening) == (True, False)
    assert (result.category_scores.harassment, result.category_scores.harassment_threatening) == (0.25, 0.0)


async def test_a_policy_in_shadow_flags_nothing(service: Service) -> None:
    """Whatever it finds, no category is true."""
    thresholds = {Role.USER: (Threshold(Action.FLAG, 0.1),)}
    policy = Policy("p", "r", "", (Category("h", "H", ("X1",), thresholds),), POLICY.on_error, shadow=True)
    service.judge.policies = PolicyStore([policy], "p")
    async with client_of(service) as client:
        (result,) = (await client.moderations.create(input="Hi!")).results
    assert not result.flagged
    assert not any(result.categories.model_dump().values())
