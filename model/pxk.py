"""P x K batches: P characters with K drawings each, everything in a batch embedded once and compared many times.

Promise: the P characters come in equal numbers from a few alphabets, so that a character meets others of its own
alphabet; its K drawings are by K different people. Every two drawings of a character are a pair (P K (K - 1) / 2 of
them), and each of these has `negatives` pairs of its anchor with a drawing of another character of the same alphabet.
Alphabets too small to give their share take no part. A pair that is chosen is a harder example than one at random:
Hermans, Beyer and Leibe 2017, "In Defense of the Triplet Loss".
"""

from __future__ import annotations

import torch

from model.batch import Batch
from model.drawings import DataError, Drawings


class CharacterBatches:
    """Draws batches of `characters` x `drawings` images from `alphabets` alphabets at a time.

    With `same_alphabet` off, negatives are other characters of the whole batch. Raises DataError where the drawings
    cannot give such a batch; `characters` must be a multiple of `alphabets`.
    """

    def __init__(
        self,
        drawings: Drawings,
        *,
        characters: int,
        per_character: int,
        alphabets: int,
        negatives: int,
        same_alphabet: bool = True,
    ) -> None:
        share = characters // alphabets
        assert share * alphabets == characters, (characters, alphabets)
        if drawings.drawers < per_character:
            raise DataError(
                f"batches of {per_character} drawings of a character (setting drawings): there are {drawings.drawers}"
            )
        alphabet = drawings.alphabet.cpu()
        sizes = torch.bincount(alphabet, minlength=len(drawings.alphabets))
        usable = (sizes >= share).nonzero().flatten()
        if len(usable) < alphabets:
            raise DataError(
                f"batches of {share} characters from each of {alphabets} alphabets: of {len(drawings.alphabets)} to "
                f"train on, {len(usable)} have so many; set characters and alphabets (1, say) to what there is"
            )
        self.characters, self.per_character, self.alphabets = characters, per_character, alphabets
        self.drawers, self.device = drawings.drawers, drawings.device
        members = [(alphabet == a).nonzero().flatten() for a in usable.tolist()]
        self._table = torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=-1)  # (A, M)
        self._share = share
        # The pairs of drawings of one character, then of all of them; positions are p * K + k.
        one = torch.triu_indices(per_character, per_character, offset=1)  # (2, K (K - 1) / 2)
        base = torch.arange(characters)[:, None] * per_character
        self._first = (base + one[0]).flatten()
        self._second = (base + one[1]).flatten()
        self._anchor = self._first.repeat_interleave(negatives)
        self._group = share if same_alphabet else characters  # a negative is looked for among so many characters
        positives, others = len(self._first), len(self._anchor)
        self._same = torch.cat([torch.ones(positives), torch.zeros(others)]).to(self.device)
        weights = [torch.full((positives,), 0.5 / positives), torch.full((others,), 0.5 / others)]
        self._weight = torch.cat(weights).to(self.device)

    def draw(self, generator: torch.Generator, step: int = 0) -> Batch:
        """One batch; images stand character by character, those of an alphabet together."""
        k = self.per_character
        # The smallest of one random key for each: distinct alphabets, characters, drawers; padding sorts last.
        of = torch.rand(len(self._table), generator=generator).topk(self.alphabets, largest=False).indices
        table = self._table[of]
        keys = torch.rand(table.shape, generator=generator)
        keys[table < 0] = 2.0
        chosen = table.gather(1, keys.topk(self._share, dim=1, largest=False).indices).flatten()  # (P,)
        hands = torch.rand(self.characters, self.drawers, generator=generator).topk(k, dim=1, largest=False).indices
        images = (chosen[:, None] * self.drawers + hands).flatten()  # (P K,)

        own = self._anchor // k
        start = own - own % self._group
        chance = torch.rand(2, len(own), generator=generator, dtype=torch.float64)
        other = start + (own - start + 1 + (chance[0] * (self._group - 1)).long()) % self._group
        negative = other * k + (chance[1] * k).long()
        return Batch(
            images.to(self.device, non_blocking=True),
            torch.cat([self._first, self._anchor]).to(self.device, non_blocking=True),
            torch.cat([self._second, negative]).to(self.device, non_blocking=True),
            self._same,
            self._weight,
            positives=len(self._first),
        )
