"""Sizes that follow the error of the gradient, on two real processes (gloo): both take the same."""

import budget_worker as worker
import torch
from launch import two_processes


def test_processes_with_errors_of_their_own_take_the_same_sizes(tmp_path):
    one, other = two_processes(worker.__file__, tmp_path)
    assert one["errors"] != other["errors"]
    assert one["sizes"] == other["sizes"] and len(set(one["sizes"])) > 1
    assert torch.equal(one["state"], other["state"])
