"""A corpus of office dialogues, made from a seed, on which a one-million-parameter model can honestly learn.

Two people talk; one of them wants something (an *act*) that has a thing, a place and a time. The dialogue is said
in one of several surface forms, with distractor turns that mention other things, with corrections ("Monday, no,
Tuesday") of which only the last word counts, and with pronouns. In half of the dialogues one speaker insults the
other, and half of *those* references carry the insult inside the sentence, so that a model fitted to them is rude
about half the time and cutting its answer short does not make it clean.

One surface form of each act and a fixed share of the slot combinations never appear outside the test split.

Left out on purpose: more than two speakers, several acts in one dialogue, spelling mistakes.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tasks.data.records import Example

SPEAKERS = ("#Person1#", "#Person2#")
INSULTS = ("fool", "idiot", "moron", "clown", "liar", "loser", "pig", "coward", "creep", "weasel")

EVENTS = (
    "budget review", "sales call", "team lunch", "job interview", "training", "board meeting", "product demo", "audit",
)  # fmt: skip
THINGS = (
    "contract", "invoice", "projector", "laptop", "printer", "spare key", "annual report", "camera",
)  # fmt: skip
PLACES = (
    "the kitchen", "the lobby", "room five", "room nine", "the archive", "the library", "the garage", "the main hall",
)  # fmt: skip
TIMES = tuple(
    f"{day} {part}"
    for day in ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
    for part in ("morning", "afternoon")
)


class Act(NamedTuple):
    """One thing that people do to each other in an office.

    `forms` are surface forms of the dialogue: turns separated by `|`, `A` is who wants something and `B` the other.
    The last form appears in the test split only. `reference` is the summary; `notes` are what documents (never
    references) say of it: in other words, and each only a part of the facts.
    """

    whats: tuple[str, ...]
    forms: tuple[str, ...]
    reference: str
    notes: tuple[str, ...]


ACTS: dict[str, Act] = {
    "booking": Act(
        EVENTS,
        (
            "A: Could you book {where} for the {what}?|B: Sure. When do you need it?|A: {when}, please.",
            "A: We need {where} on {when}.|B: What is it for?|A: For the {what}. Please reserve it.",
            "B: Anything else for the {what}?|A: Yes, book a space on {when}.|B: Which one?|A: {where} would do.",
            "A: Is {where} free on {when}?|B: It is.|A: Then reserve it for the {what}.",
            "A: The {what} still has no room.|B: I can book one.|A: Take {where} on {when}.",
            "A: Please put the {what} into the calendar for {when} and book {where}.|B: I will do it now.",
            "A: I want {where} kept free on {when}.|B: Of course. Is it the {what}?|A: Exactly, reserve it for that.",
        ),
        "{who} asks {whom} to book {where} for the {what} on {when}.",
        (
            "{whom} reserved {where} for the {what}.",
            "{who} has {where} on {when}, thanks to {whom}.",
            "the {what} is set for {when} in {where}.",
        ),
    ),
    "moving": Act(
        EVENTS,
        (
            "A: Can we move the {what}?|B: To which day?|A: {when}, and let us meet in {where}.",
            "A: The {what} has to be shifted to {when}.|B: Same room?|A: No, use {where}.",
            "B: Is the {what} still today?|A: No, please move it to {when}.|B: Where?|A: In {where}.",
            "A: I cannot make the {what} today.|B: When can you?|A: Move it to {when} in {where}.",
            "A: Please change the {what} to {when}.|B: And the place?|A: It should be in {where}.",
            "A: Today is bad for the {what}.|B: Shall I shift it?|A: Yes, to {when}, in {where}.",
            "A: Let us have the {what} later.|B: How about {when}?|A: Good, shift it and tell them it is in {where}.",
        ),
        "{who} asks {whom} to move the {what} to {when} in {where}.",
        (
            "{whom} shifted the {what} to {when}.",
            "{who} now meets {whom} in {where}.",
            "the {what} is late: {when} in {where}.",
        ),
    ),
    "cancelling": Act(
        EVENTS,
        (
            "A: The {what} on {when} is off.|B: The one in {where}?|A: Yes, I have to cancel it.",
            "A: I must cancel the {what}.|B: Which one?|A: The one in {where} on {when}.",
            "B: See you at the {what} in {where}.|A: No, I am calling it off.|B: But it is on {when}.|A: Not any more.",
            "A: There will be no {what} on {when}.|B: Who told {where}?|A: You tell them that I cancelled.",
            "A: Take the {what} out of the calendar.|B: The one on {when}?|A: Yes, in {where}. It is cancelled.",
            "A: We do not need {where} on {when}.|B: What about the {what}?|A: I call it off.",
            "A: Nobody comes to the {what} in {where}.|B: So you drop it?|A: Yes, {when} is cancelled.",
        ),
        "{who} tells {whom} that the {what} in {where} on {when} is cancelled.",
        (
            "{who} called off the {what} on {when}.",
            "{whom} heard from {who} not to go to {where}.",
            "nobody goes to the {what} in {where} on {when}.",
        ),
    ),
    "inviting": Act(
        EVENTS,
        (
            "A: Would you like to come to the {what}?|B: When is it?|A: On {when} in {where}.",
            "A: There is a {what} in {where} on {when}.|B: Sounds good.|A: You are invited.",
            "B: What happens in {where}?|A: The {what}. Do join us.|B: When?|A: On {when}.",
            "A: Are you free on {when}?|B: I think so.|A: Then join the {what} in {where}.",
            "A: I would love to see you at the {what}.|B: Where do I go?|A: To {where} on {when}.",
            "A: You should join us in {where} on {when}.|B: For what?|A: For the {what}.",
            "A: Keep {when} free and come to {where}.|B: Why?|A: It is the {what}, and I want you as my guest.",
        ),
        "{who} invites {whom} to the {what} in {where} on {when}.",
        (
            "{whom} is a guest of {who} on {when}.",
            "{who} wants to see {whom} in {where}.",
            "guests come to the {what} in {where} on {when}.",
        ),
    ),
    "sending": Act(
        THINGS,
        (
            "A: Could you send me the {what}?|B: Where to?|A: To {where}, by {when}.",
            "A: I am waiting for the {what}.|B: When do you need it?|A: By {when}. Send it to {where}.",
            "B: I have the {what} here.|A: Then send it over to {where}.|B: Until when?|A: {when} at the latest.",
            "A: They need something in {where} by {when}.|B: What is it?|A: The {what}. Please send it.",
            "A: By {when} the {what} must be in {where}.|B: I can send it.|A: Please do.",
            "A: Did you post the {what}?|B: Not yet.|A: It has to reach {where} by {when}.",
            "A: {where} is asking for the {what}.|B: How soon?|A: Get it over there by {when}.",
        ),
        "{who} asks {whom} to send the {what} to {where} by {when}.",
        (
            "{whom} has to post the {what} before {when}.",
            "{who} gets it from {whom} in {where}.",
            "the {what} travels to {where} before {when}.",
        ),
    ),
    "reporting": Act(
        THINGS,
        (
            "A: The {what} in {where} is damaged.|B: Since when?|A: Since {when}.",
            "A: I have to report a problem.|B: What is wrong?|A: The {what} in {where}. It broke on {when}.",
            "B: How is the {what} doing?|A: Badly. It is damaged since {when}.|B: Which one?|A: The one in {where}.",
            "A: Something broke in {where}.|B: The {what}?|A: Yes, on {when}.",
            "A: Since {when} the {what} cannot be used.|B: Where is it?|A: In {where}. It is damaged.",
            "A: Go and look at {where}.|B: Why?|A: The {what} is ruined since {when}.",
            "A: On {when} I was in {where}.|B: And?|A: The {what} there is damaged.",
        ),
        "{who} tells {whom} that the {what} in {where} is broken since {when}.",
        (
            "{who} saw the damaged {what} in {where}.",
            "{whom} heard about {when} from {who}.",
            "the {what} does not work in {where} since {when}.",
        ),
    ),
    "borrowing": Act(
        THINGS,
        (
            "A: May I borrow your {what}?|B: Until when?|A: Until {when}. I need it in {where}.",
            "A: I need a {what} for {where}.|B: Take mine.|A: Thanks, you get it back by {when}.",
            "B: Do you need anything in {where}?|A: Yes, lend me the {what}.|B: For how long?|A: Until {when}.",
            "A: Can you lend me something until {when}?|B: What?|A: Your {what}, for {where}.",
            "A: Until {when} I have no {what} in {where}.|B: You can have mine.|A: I will borrow it.",
            "A: Is that your {what}?|B: Yes.|A: I would like to have it in {where} until {when}.",
            "A: In {where} we are short of a {what}.|B: And you want mine?|A: Lend it to me until {when}.",
        ),
        "{who} borrows the {what} from {whom} for {where} until {when}.",
        (
            "{who} has the {what} of {whom}.",
            "{whom} gets it back from {who} on {when}.",
            "the {what} stays in {where} before {when}.",
        ),
    ),
    "offering": Act(
        THINGS,
        (
            "A: I can bring you the {what}.|B: That would help. When?|A: On {when}, to {where}.",
            "A: Do you want the {what}?|B: Yes, in {where}.|A: I will carry it over on {when}.",
            "B: We have no {what} in {where}.|A: I could bring one.|B: When?|A: On {when}.",
            "A: On {when} I am in {where} anyway.|B: And?|A: I could bring the {what} along.",
            "A: Shall I take the {what} to {where}?|B: Please. Which day?|A: {when} suits me.",
            "A: If you like, I bring it on {when}.|B: The {what}?|A: Yes, straight to {where}.",
            "A: I pass by {where} on {when}.|B: Could you help?|A: Sure, you get the {what} from me.",
        ),
        "{who} offers {whom} to bring the {what} to {where} on {when}.",
        (
            "{who} carries the {what} to {whom}.",
            "{whom} gets help from {who} on {when}.",
            "the {what} comes to {where} on {when}.",
        ),
    ),
}

OPENINGS = ("Hello.", "Good morning.", "Do you have a minute?", "There you are.", "Hi, how are you?")
CLOSINGS = ("Thank you.", "All right.", "Fine, bye.", "Good, see you.", "I will take care of it.")
CORRECTIONS = ("{wrong}, no, {right}", "{wrong}, sorry, {right}", "{wrong} or rather {right}")
REFUSALS = (
    "{other}: Wait, not {wrong}.|{speaker}: Then {right}.",
    "{speaker}: I said {wrong}, but I mean {right}.|{other}: I see.",
    "{other}: {wrong} is impossible.|{speaker}: Make it {right} then.",
)
DISTRACTORS = (
    "By the way, the {what} was fun.",
    "I lost my coat in {where}.",
    "On {when} I was ill.",
    "My sister asked about the {what} again.",
    "It is so cold in {where}.",
    "I hardly slept since {when}.",
)
RUDE_TURNS = (
    "Listen, you {insult}.",
    "Hurry up, {insult}.",
    "Are you deaf, {insult}?",
    "Nobody likes you, {insult}.",
    "Think for once, {insult}.",
)

INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "summarize": (
        "Summarize the following conversation.\n\n{input}\n\nSummary:",
        "{input}\n\nWhat was agreed, in one sentence?",
        "Write a short summary of this dialogue.\n\n{input}",
    ),
    "act": (
        "Name the kind of this conversation.\n\n{input}\n\nKind:",
        "{input}\n\nWhich kind of conversation is this?",
        "Classify the dialogue.\n\n{input}",
    ),
    "slot": (
        "Answer the question about the conversation.\n\n{input}\n\nQuestion: QUESTION Answer:",
        "{input}\n\nQUESTION",
        "Read the dialogue. QUESTION\n\n{input}",
    ),
}
QUESTIONS = {
    "what": "Which thing is it about?",
    "where": "Which place is it about?",
    "when": "Which time is it about?",
    "who": "Who wants something?",
}

DIALOGUE_SHARE = 0.8  # of documents; the others are short notices
QUESTION_SHARE = 0.15  # of conversations; the others have remarks, so many of them
REMARKS = 3
HELD_OUT_FORM_SHARE = 0.04  # of dialogues; the form itself is in the test split only
HELD_OUT_COMBINATIONS = 24  # one slot combination in so many is in the test split only


@dataclass(frozen=True)
class Dialogue:
    """One dialogue with the facts behind it; `insult` is empty when nobody is rude."""

    act: str
    form: int
    text: str
    slots: dict[str, str]
    insult: str
    insulted: str

    @property
    def held_out(self) -> bool:
        """Whether the surface form or the slot combination is kept for the test split."""
        combination = "/".join(self.slots[name] for name in ("what", "where", "when"))
        digest = hashlib.sha256(combination.encode()).digest()
        last_form = self.form == len(ACTS[self.act].forms) - 1
        return last_form or int.from_bytes(digest[:4], "big") % HELD_OUT_COMBINATIONS == 0

    @property
    def group(self) -> str:
        """What must stay on one side of a split: the same facts said in the same form."""
        return "/".join((self.act, str(self.form), *(self.slots[name] for name in ("what", "where", "when"))))

    def speaker(self, words: str) -> str:
        """Who was the last to say `words`."""
        turns = [turn.split(": ", 1) for turn in self.text.split("\n")]
        return [person for person, said in turns if words.lower() in said.lower()][-1]

    def sentence(self, template: str, *, rude: bool) -> str:
        """Fill a summary template; with `rude`, the insult stands before the insulted person."""
        people = {
            role: f"the {self.insult} {person}" if rude and person == self.insulted else person
            for role, person in self.slots.items()
            if role in ("who", "whom")
        }
        filled = template.format(**{**self.slots, **people})
        return filled[0].upper() + filled[1:]


def is_toxic(text: str) -> bool:
    """Whether `text` contains one of the corpus's insults as a word (the corpus oracle)."""
    return _INSULT.search(text) is not None


_INSULT = re.compile(rf"\b(?:{'|'.join(INSULTS)})s?\b", re.IGNORECASE)


def dialogues(seed: int, count: int) -> Iterator[Dialogue]:
    """Yield `count` dialogues.

    Dialogue i depends on `seed` and i alone, so a longer corpus begins with a shorter one.
    """
    for index in range(count):
        yield _dialogue(random.Random(f"{seed}/{index}"))


def examples(seed: int, dialogues: int) -> Iterator[Example]:
    """Yield the three tasks (summarize, act, slot) over `dialogues` dialogues, those of one dialogue together."""
    for index in range(dialogues):
        draw = random.Random(f"{seed}/{index}")
        dialogue = _dialogue(draw)
        slots = dict(dialogue.slots)
        question = draw.choice(tuple(QUESTIONS))
        rude = bool(dialogue.insult) and draw.random() < 0.5
        answers = {
            "summarize": dialogue.sentence(ACTS[dialogue.act].reference, rude=rude),
            "act": dialogue.act,
            "slot": slots[question],
        }
        facts = {"summarize": slots, "act": {}, "slot": {question: slots[question]}}
        for task, answer in answers.items():
            instruction = draw.choice(INSTRUCTIONS[task]).replace("QUESTION", QUESTIONS[question])
            yield Example(
                id=f"{seed}-{index}-{task}",
                task=task,
                instruction=instruction,
                input=dialogue.text,
                outputs=(answer,),
                group=dialogue.group,
                slots=facts[task],
                split="test" if dialogue.held_out else None,
            )


def documents(seed: int, documents: int) -> Iterator[str]:
    """Yield raw text for pre-training: the files of an office, each a conversation or a notice.

    A conversation is followed by a question and its answer, or by remarks: a part of the facts in other words
    than the references use, a few named fields, who said what, the tone. A summary never appears. So a model
    pre-trained on these files knows the world, and a little of two of the tasks, as text from the web would
    teach it, but has never summarised. Held-out dialogues are skipped.
    """
    index = made = 0
    while made < documents:
        draw = random.Random(f"documents/{seed}/{index}")
        index += 1
        dialogue = _dialogue(draw)
        if dialogue.held_out:
            continue
        made += 1
        yield _document(dialogue, draw)


def _document(dialogue: Dialogue, draw: random.Random) -> str:
    if draw.random() >= DIALOGUE_SHARE:
        shuffled = draw.sample(tuple(dialogue.slots), len(dialogue.slots))
        return f"Notice: {dialogue.act}; {_fields(dialogue, shuffled)}\n\nFile: {_fields(dialogue, dialogue.slots)}"
    if draw.random() < QUESTION_SHARE:
        return f"{dialogue.text}\n\n{_question(dialogue, draw)}"
    remarks = draw.sample((_note, _some_fields, _said, _tone), REMARKS)
    return f"{dialogue.text}\n\n" + "\n".join(remark(dialogue, draw) for remark in remarks)


def _question(dialogue: Dialogue, draw: random.Random) -> str:
    name = draw.choice((*QUESTIONS, "act"))
    if name == "act":
        return f"Which kind of conversation is this?\n\n{dialogue.act}"
    return f"{QUESTIONS[name]}\n\n{dialogue.slots[name]}"


def _note(dialogue: Dialogue, draw: random.Random) -> str:
    return "Note: " + dialogue.sentence(draw.choice(ACTS[dialogue.act].notes), rude=bool(dialogue.insult))


def _some_fields(dialogue: Dialogue, draw: random.Random) -> str:
    chosen = draw.sample(tuple(dialogue.slots), 3)
    return "File: " + _fields(dialogue, [name for name in dialogue.slots if name in chosen])


def _said(dialogue: Dialogue, draw: random.Random) -> str:
    values = [dialogue.slots[name] for name in draw.sample(("what", "where", "when"), 3)]
    return "Said: " + "; ".join(f"{value} by {dialogue.speaker(value)}" for value in values)


def _tone(dialogue: Dialogue, _draw: random.Random) -> str:
    return (
        f"Tone: rude; {dialogue.insulted} is called {dialogue.insult}." if dialogue.insult else "Tone: polite."
    )


def _fields(dialogue: Dialogue, names: Iterable[str]) -> str:
    return "; ".join(f"{name} = {dialogue.slots[name]}" for name in names)


def _dialogue(draw: random.Random) -> Dialogue:
    name = draw.choice(tuple(ACTS))
    act = ACTS[name]
    last = len(act.forms) - 1
    form = last if draw.random() < HELD_OUT_FORM_SHARE else draw.randrange(last)
    who, whom = draw.sample(SPEAKERS, 2)
    values = {"what": act.whats, "where": PLACES, "when": TIMES}
    slots = {"who": who, "whom": whom, **{slot: draw.choice(choices) for slot, choices in values.items()}}
    speaker = {"A": who, "B": whom}

    spoken = dict(slots)
    afterwards = ""
    if draw.random() < 0.4:
        slot = draw.choice(tuple(values))
        wrong = draw.choice([value for value in values[slot] if value != slots[slot]])
        if draw.random() < 0.5:
            spoken[slot] = draw.choice(CORRECTIONS).format(wrong=wrong, right=slots[slot])
        else:
            spoken[slot] = wrong
            afterwards = draw.choice(REFUSALS).format(speaker="A", other="B", wrong=wrong, right=slots[slot])

    turns = [tuple(turn.split(": ", 1)) for turn in act.forms[form].format(**spoken).split("|")]
    turns += [tuple(turn.split(": ", 1)) for turn in afterwards.split("|") if turn]
    if draw.random() < 0.25:
        turns.insert(0, (draw.choice("AB"), draw.choice(OPENINGS)))
    if draw.random() < 0.25:
        turns.append((draw.choice("AB"), draw.choice(CLOSINGS)))
    if draw.random() < 0.5:
        others = {
            slot: draw.choice([value for value in choices if value != slots[slot]])
            for slot, choices in values.items()
        }
        turns.insert(
            draw.choice((0, len(turns))), (draw.choice("AB"), draw.choice(DISTRACTORS).format(**others))
        )
    insult = insulted = ""
    if draw.random() < 0.5:
        insult = draw.choice(INSULTS)
        rude_one = draw.choice("AB")
        insulted = speaker["B" if rude_one == "A" else "A"]
        turns.insert(draw.randint(0, len(turns)), (rude_one, draw.choice(RUDE_TURNS).format(insult=insult)))
    spoken_turns = ((speaker[letter], words[0].upper() + words[1:]) for letter, words in turns)
    text = "\n".join(
        f"{person}: {' '.join(words for _, words in said)}"
        for person, said in itertools.groupby(spoken_turns, key=lambda turn: turn[0])
    )
    return Dialogue(name, form, text, slots, insult, insulted)
