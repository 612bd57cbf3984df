"""Every form of a request body says how it is answered."""

from __future__ import annotations

import pytest

from rlhf_ray.serving.protocols.fields import Body
from rlhf_ray.serving.protocols.registry import PROTOCOLS


def test_a_form_without_an_answer_cannot_be_made_and_none_is_served() -> None:
    class Silent(Body):
        """A form that forgets its answer."""

    with pytest.raises(TypeError, match=r"abstract method '?parse"):
        Silent()
    forms = [form for protocol in PROTOCOLS for form in protocol.bodies]
    assert forms and all(not form.__abstractmethods__ for form in forms)
