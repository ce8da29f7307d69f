"""Questions that a page asks, and what the reader can do with the answers."""

import shlex

from facepipe.reports.model import Choice, Decision, Face, Step

ASKS_FOR = ": is this "
"""What stands in a title between a label and the name that is suggested for it; a question mark ends the title."""


def build_pair_choices(first: Face, second: Face, *, suggests_one: bool) -> tuple[Choice, ...]:
    """Build the answers to whether two faces, and the faces that go with them, are one person.

    Args:
        first: a face of the first side.
        second: a face of the second side.
        suggests_one: whether the suggestion is that they are one person.
    """
    if first.face_id is None or second.face_id is None:
        return ()
    one = Choice("", "One person", (Decision("same_as", first.face_id, second.face_id),))
    two = Choice("", "Two persons", (Decision("different_from", first.face_id, second.face_id),))
    yes, no = (one, two) if suggests_one else (two, one)
    return (Choice("a", yes.label, yes.decisions, agrees=True), Choice("r", no.label, no.decisions, agrees=False))


def build_label_choices(face_id: int, label: str, other: str, *, suggests_other: bool) -> tuple[Choice, ...]:
    """Build the answers to whether a face bears the right label.

    Args:
        face_id: the face.
        label: its label.
        other: name of the person that it fits best besides; empty if there is none.
        suggests_other: whether the suggestion is that the face is that person.
    """
    is_label = Choice("r", f"Label is right: {label}", (Decision("is", face_id, person=label),), agrees=False)
    is_not_label = (Decision("is_not", face_id, person=label),)
    if not other:
        return (Choice("a", f"Is not {label}", is_not_label, agrees=True), is_label)
    is_other = (Decision("is", face_id, person=other),)
    if suggests_other:
        neither = (*is_not_label, Decision("is_not", face_id, person=other))
        return (
            Choice("a", f"Is {other}", is_other, agrees=True),
            is_label,
            Choice("o", "Neither of both", neither, agrees=True),
        )
    return (
        Choice("a", f"Is not {label}", is_not_label, agrees=True),
        is_label,
        Choice("o", f"Is {other}", is_other, agrees=True),
    )


def list_review_steps(gallery: str, report: str, again: Step) -> tuple[Step, ...]:
    """List what to do with a page of questions.

    Args:
        gallery: path of the gallery.
        report: name of the report.
        again: how to run the command again.
    """
    path = shlex.quote(gallery)
    return (
        Step("Answer the questions below with the keys that they name (? lists all), and export your decisions.", ""),
        Step("Apply the file that you exported:", f"facepipe apply {path} FILE"),
        again,
        Step("Or answer on a page that saves at once:", f"facepipe review {path} --report {report}"),
    )
