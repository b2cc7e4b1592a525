"""plaingpt/system/seeds.py: random numbers depend on what they are for, and on nothing else."""
import torch

from plaingpt.system.seeds import mixed_seed


def test_each_seed_step_and_micro_batch_has_random_numbers_of_its_own():
    purposes = [(1337, 5, 2), (1338, 5, 2), (1337, 6, 2), (1337, 5, 3), (5, 1337, 2), (1337, 2, 5),
                (2 ** 70, 5, 2)]

    def draw(purpose):
        torch.manual_seed(mixed_seed(*purpose))
        return tuple(torch.rand(4).tolist())

    drawn = [draw(purpose) for purpose in purposes]
    assert len(set(drawn)) == len(purposes)
    assert drawn == [draw(purpose) for purpose in purposes]


def test_a_mixed_seed_is_the_same_in_every_version_and_small_enough_for_torch():
    """A resumed run must draw what it drew before an update of this repository."""
    assert mixed_seed(1337, 5, 2) == (1337 * 1_000_003 + 5) * 1_000_003 + 2
    assert 0 <= mixed_seed(2 ** 70, 5, 2) < 2 ** 63


def test_seeding_the_cpus_generator_alone_gives_the_numbers_of_manual_seed():
    """train.py relies on this shortcut."""
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.default_generator.manual_seed(7)
    assert torch.equal(torch.rand(4), expected)
