"""Transcripts as plain words: CHAT files of DementiaBank without annotations and without the interviewer."""

import re


#: applied in order
_MARKS = (
    (r"\x15[^\x15]*\x15", " "),  # time marks
    (r"\[[^\]]*\]", " "),  # [//], [: correction], [* error], [+ gram]
    (r"\((?:\.+|\d*:?\d+\.?\d*)\)", " "),  # pauses (.), (..), (1.5)
    (r"&=\S+", " "),  # &=laughs
    (r"&[-+~]?", ""),  # &-uh, a filler: the word stays
    (r"\+\S*", " "),  # +..., +/., +<
    (r"\b(?:xxx|yyy|www)\b", " "),  # unintelligible words
    (r"@\w+", ""),  # word@o
    (r"(?<=\w)\((\w+)\)|\((\w+)\)(?=\w)", r"\1\2"),  # goin(g), (be)cause
    (r"\b0(?=[a-z])\w*", " "),  # 0is, a word left out
    (r"[<>‡„^↑↓:_]+", " "),
    (r"\s+([.?!,])", r"\1"),
    (r"\s+", " "),
)


def clean_chat(text: str) -> str:
    """One utterance in CHAT without annotations."""
    for pattern, replacement in _MARKS:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def read_chat(content: str, speaker: str = "PAR") -> str:
    """The words of a speaker in a CHAT (`.cha`) file, utterances joined by spaces.

    Args:
        content: the text of the file.
        speaker: code of the speaker; `PAR` is the participant, `INV` the interviewer.

    Raises:
        ValueError: if the speaker says nothing; the message lists those who do.
    """
    # A line that starts with a tab continues the one before.
    lines = re.sub(r"\r?\n[\t ]+", " ", content).splitlines()
    tiers = [match.groups() for line in lines if (match := re.match(r"\*(\w+):\s*(.*)", line))]
    utterances = [cleaned for who, said in tiers if who == speaker and (cleaned := clean_chat(said))]
    # Punctuation alone is not speech.
    if not re.search(r"\w", " ".join(utterances)):
        speakers = ", ".join(sorted({who for who, _ in tiers})) or "nobody"
        raise ValueError(f"{speaker} has no words in this transcript. Its speakers: {speakers}.")
    return " ".join(utterances)
