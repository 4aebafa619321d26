"""The built-in scores: well formed, and consistent with the keys they claim."""

import itertools

import pytest

from musiclm_engine.data.scores import kind_of, load_pieces, parse_key, tonic_name


def test_every_piece_is_well_formed() -> None:
    pieces = load_pieces()
    assert len({piece.id for piece in pieces}) == len(pieces) > 4000
    for piece in pieces:
        assert len(piece.parts) == (4 if piece.is_chorale else 1), piece.id
        assert 0 <= piece.pickup_quarters < piece.bar_quarters, piece.id
        for part in piece.parts:
            onsets = [note.onset_quarters for note in part]
            assert onsets == sorted(onsets) and onsets[0] >= 0, piece.id
            assert all(note.duration_quarters > 0 and 20 < note.pitch < 110 for note in part)


def test_tunes_are_monophonic_and_on_the_beat() -> None:
    tunes = [piece for piece in load_pieces() if not piece.is_chorale]
    for piece in tunes:
        (part,) = piece.parts
        for note, following in itertools.pairwise(part):
            end = note.onset_quarters + note.duration_quarters
            assert end <= following.onset_quarters + 1e-9, piece.id
    # abc2midi starts every note a tick late; here they start where they are written.
    on_beat = sum(note.onset_quarters % 0.5 == 0 for piece in tunes for note in piece.parts[0])
    assert on_beat > 0.4 * sum(len(piece.parts[0]) for piece in tunes)


@pytest.mark.parametrize(("is_chorale", "least"), [(True, 0.85), (False, 0.6)])
def test_pieces_end_on_the_note_of_their_key(is_chorale: bool, least: float) -> None:
    """The bass of a chorale and a tune's last note: mostly the tonic, so keys fit the notes."""
    pieces = [p for p in load_pieces() if p.is_chorale == is_chorale and p.tonic is not None]
    on_tonic = sum(piece.parts[-1][-1].pitch % 12 == piece.tonic for piece in pieces)
    assert on_tonic / len(pieces) > least


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("G", (7, "major")),
        ("Am", (9, "minor")),
        ("E Minor", (4, "minor")),
        ("EM", (4, "major")),
        ("Ador", (9, "dorian")),
        ("A Mixolydian", (9, "mixolydian")),
        ("Gmix", (7, "mixolydian")),
        ("Bb", (10, "major")),
        ("F#m", (6, "minor")),
        ("Bphr", (11, "phrygian")),
        ("Hp", None),
        ("Bn", None),
        ("", None),
        (None, None),
    ],
)
def test_parse_key(text: str | None, expected: tuple[int, str] | None) -> None:
    assert parse_key(text) == expected


def test_tonics_are_spelled_as_usual() -> None:
    assert [tonic_name(pc, "major") for pc in (1, 3, 6, 8, 10)] == ["Db", "Eb", "F#", "Ab", "Bb"]
    assert [tonic_name(pc, "minor") for pc in (13, 3, 6, 8, 10)] == ["C#", "Eb", "F#", "G#", "Bb"]


def test_kind_comes_from_the_tunes_own_words() -> None:
    assert kind_of("REEL", "x") == "reel"
    assert kind_of("slipjig", "x") == "slip jig"
    assert kind_of(None, "The Free Mason's March.") == "march"
    assert kind_of(None, "Marching to Georgia") == "folk tune"
    assert kind_of("C:O'Carolan", "Planxty Burke") == "planxty"
    assert kind_of(None, "Quick Step. 25th Regt.") == "quickstep"
    assert kind_of(None, "Miss Grant's Strathsy.") == "strathspey"
    assert kind_of(None, "McLEAN'S LAMENTATION") == "lament"
    assert kind_of(None, "Quick March by Mr. Handel") == "march"
    assert kind_of(None, "The Morning Air") == "air"
    assert kind_of(None, "Fairy Air Dances") == "folk tune"
    assert kind_of("air", "The Soldier's March") == "air"


def test_kinds_taken_from_titles_are_in_the_scores() -> None:
    kinds = {piece.kind for piece in load_pieces()}
    assert {"quickstep", "lament", "planxty", "air", "march", "allemande", "lullaby"} <= kinds


def test_only_the_irish_book_is_called_irish() -> None:
    books = {(piece.id.split("/")[0], piece.origin) for piece in load_pieces()}
    assert books == {
        ("bach", None),
        ("airdsAirs", None),
        ("ryansMammoth", None),
        ("oneills1850", "Irish"),
    }
