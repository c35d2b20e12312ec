"""What a user is told."""

from metalit.errors import InputError


def test_a_message_is_one_line_of_at_most_500_letters_with_its_beginning_and_its_end():
    assert str(InputError("model.steps=3\nmust be 2")) == "model.steps=3 must be 2"
    said = str(InputError(f"model.steps={'a' * 10_000} must be 2; give 2"))
    assert said.startswith("model.steps=aaa")
    assert said.endswith("aaa must be 2; give 2")
    assert len(f"metalit: rank 12: error: {said}") <= 500
