"""ThoughtLayout: where the thoughts of a packed sequence start, and what each row may see.

A packed sequence is ``[text (L) | thought rows (R)]``. In a grid, thought rows have the order ``r = (p*N + n)*S + s``. Row
(p, n, s) belongs to text position ``t = anchor[b, p]``. It sees the text in ``[lo[b, t], t]`` and rows (p, n, 0..s) of its own
thought, and nothing else. Text row t sees the text in ``[lo[b, t], t]`` (Quiet-STaR, arXiv 2403.09629, section 4.2 and figure
3).

``packed`` has thoughts of unequal length, called branches, whose rows stand one after another without padding. With
``own="full"`` a row sees all live rows of its own thought, later ones too. In a ``tree`` branches go on from branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .branches import ANCHOR, DEPTH, END, Branches, Size, of_rows, tree_of
from .checks import IGNORED, INTEGERS, MASKS, Checker, check_instance, has_values, on_host, refuse_where

OP = "ThoughtLayout"
OWN = ("causal", "full")
T = TypeVar("T")
POSITIONS = "position ids"  # the only table that is the same for all back ends
MOST_ROWS = 2**31 - 1  # kernels number the rows of a text in 32 bits


class _Made:
    """Branches, and the layout's fields that they were made from. No container, so that no framework looks into it.

    Attributes:
        tables: what an op makes from the branches, by name.
    """

    def __init__(self, layout: ThoughtLayout, branches: Branches, tables: dict[str, Any]):
        self.fields, self.branches, self.tables = _own_fields(layout), branches, tables

    def serves(self, layout: ThoughtLayout) -> bool:
        pairs = zip(self.fields, _own_fields(layout), strict=True)
        return all(x is y if isinstance(x, Tensor) or isinstance(y, Tensor) else x == y for x, y in pairs)


@dataclass(frozen=True, eq=False)
class ThoughtLayout:
    """Build one with ``every_position``, ``at``, ``from_padding``, ``from_documents``, ``packed`` or ``tree``.

    They check values once.

    Bad values raise ValueError on a CPU. On a GPU and under torch.compile they trip an assertion on the device, so that no call
    waits for it.

    Attributes:
        anchor: int32 [B,P]. The text position of each anchor, ascending; unused places are at the end and hold -1.
        lo: int32 [B,L]. The first text position that position t sees: 0, or the first after padding, or of its document.
        length: int32 [B,P,N]. Live rows of each thought, 0 to S; later rows, and all rows of unused places, are off.
        rows: S, the number of rows of a thought; if packed, the most that one has, and in a tree the most on a path.
        own: "causal": a row sees the rows of its thought up to itself; "full": all live ones.
        packed_rows: R of a packed layout, which has P = C branches and N = 1; None for a grid, where R = P*N*S.
        parent: int32 [B,C] of a tree, which is packed: the branch that each goes on from, -1 for those on the text.
    """

    anchor: Tensor
    lo: Tensor
    length: Tensor
    rows: int
    own: str = "causal"
    packed_rows: int | None = None
    parent: Tensor | None = None
    _made: _Made | None = field(default=None, repr=False)  # frameworks give ``replace`` every field

    def __post_init__(self) -> None:
        check = Checker(OP)
        check.tensor("lo", self.lo, "B,L", (torch.int32,))
        check.tensor("anchor", self.anchor, "B,P", (torch.int32,), self.lo.device)
        check.tensor("length", self.length, "B,P,N", (torch.int32,), self.lo.device)
        if not check["N"]:
            raise check.fail(f"length must have at least one thought, N=0 in shape {list(self.length.shape)}")
        check.choice("own", self.own, OWN)
        if self.packed_rows is None:
            _check_grid_sizes(check, check["N"], self.rows)
        elif check["N"] != 1:
            raise check.fail(f"length must have shape [B,C,1] if packed, got {list(self.length.shape)}")
        else:
            _check_packed_sizes(check, check["P"], check.integer("packed_rows", self.packed_rows, 0))
        if self.parent is not None:
            check.tensor("parent", self.parent, "B,P", (torch.int32,), self.lo.device)
            if self.packed_rows is None:
                raise check.fail("parent is for packed layouts")
            object.__setattr__(self, "parent", _trainable(self.parent))
        for name in ("anchor", "lo", "length"):
            object.__setattr__(self, name, _trainable(getattr(self, name)))
        if self._made is not None and not self._made.serves(self):
            object.__setattr__(self, "_made", None)

    B, L, P, N = Size("lo", 0), Size("lo", 1), Size("anchor", 1), Size("length", 2)

    @property
    def S(self) -> int:
        return self.rows

    @property
    def R(self) -> int:
        return self.P * self.N * self.rows if self.packed_rows is None else self.packed_rows

    @property
    def M(self) -> int:
        return self.L + self.R

    @property
    def device(self) -> torch.device:
        return self.lo.device

    @property
    def branches(self) -> Branches:
        """What the back ends read, made once. Thought (p, n) is branch p*N + n."""
        if self._made is not None:  # torch.compile can't trace functools.cached_property
            return self._made.branches
        made = self._make_branches()
        # Fake tensors of a real layout serve nobody else; without gradients a compiled function may be in inference mode.
        if type(made.table) is type(self.lo) and (torch.is_grad_enabled() or not torch.compiler.is_compiling()):
            object.__setattr__(self, "_made", _Made(self, made, {}))
        return made

    def _make_branches(self) -> Branches:
        length = torch.where(self.anchor[..., None] >= 0, self.length, 0).flatten(1)
        anchor = self.anchor[..., None].expand_as(self.length).flatten(1)
        if self.packed_rows is None:
            start = torch.arange(0, self.R, self.rows, dtype=torch.int32, device=self.device).expand_as(length)
        else:
            start = (length.cumsum(1) - length).int()
        table = torch.stack([anchor, start, length], -1)
        rows = of_rows(table, self.R, self.rows if self.packed_rows is None else None)
        lo, table, rows = map(_trainable, (self.lo.contiguous(), table, rows))
        tree = None if self.parent is None else _trainable(tree_of(self.parent, length)[0])
        branches = Branches(lo, table, rows, self.own == "full", tree)
        if tree is None:
            return branches
        path = torch.stack([branches.per_row(tree[..., END]), branches.row_in_path()], -1)
        return branches._replace(path=_trainable(path.int()))

    def table(self, name: str, make: Callable[[ThoughtLayout], T]) -> T:
        """What ``make`` makes from the layout, once where the branches are; for ops that are called by every layer."""
        self.branches  # noqa: B018  # makes them
        if self._made is None or torch.compiler.is_compiling():
            return make(self)
        if name not in self._made.tables:
            with torch.inference_mode(False):  # a backward may save it
                self._made.tables[name] = make(self)
        return self._made.tables[name]

    @classmethod
    def every_position(
        cls,
        batch: int,
        text_length: int,
        thoughts: int,
        rows: int,
        device: torch.device | str | None = None,
        own: str = "causal",
    ) -> ThoughtLayout:
        """Every text position is an anchor: P = L, and anchor p is position p. Raises ValueError if a size is out of range."""
        check = Checker(OP)
        batch, text_length = check.integer("batch", batch, 0), check.integer("text_length", text_length, 0)
        check.sizes.update(B=batch, L=text_length, P=text_length)
        _check_grid_sizes(check, thoughts, rows)
        device = None if device is None else check.device(device)
        anchor = torch.arange(text_length, dtype=torch.int32, device=device).repeat(batch, 1)
        length = torch.full((batch, text_length, thoughts), rows, dtype=torch.int32, device=device)
        return cls(anchor, torch.zeros_like(anchor), length, int(rows), own)

    @classmethod
    def at(
        cls,
        anchors: Tensor,
        thoughts: int,
        rows: int,
        text_length: int | None = None,
        lo: Tensor | None = None,
        length: Tensor | None = None,
        own: str = "causal",
    ) -> ThoughtLayout:
        """Thoughts at chosen anchors.

        Args:
            anchors: int32 or int64 [B,P], ascending in each row, -1 in unused places at the end.
            thoughts: N.
            rows: S.
            text_length: L; not needed if ``lo`` is given.
            lo: int32 or int64 [B,L], 0 <= lo[b,t] <= t; default 0.
            length: int32 or int64 [B,P,N], 0 to S; default S.
            own: "causal", or "full": a row sees all live rows of its own thought.

        Raises:
            ValueError: an argument with a wrong size, shape, dtype or value.
        """
        check = Checker(OP)
        check.tensor("anchors", anchors, "B,P", INTEGERS)
        _check_text(check, "at", text_length, lo, anchors.device)
        _check_grid_sizes(check, thoughts, rows)
        thoughts, rows = check["N"], int(rows)
        if lo is None:
            lo = torch.zeros((check["B"], check["L"]), dtype=torch.int32, device=anchors.device)
        check.tensor("lo", lo, "B,L", INTEGERS, anchors.device)
        if length is None:
            length = torch.full((check["B"], check["P"], thoughts), rows, dtype=torch.int32, device=anchors.device)
        elif isinstance(length, Tensor) and length.shape[2:] != (thoughts,):
            raise check.fail(f"length must have shape [B,P,N] with thoughts N={thoughts}, got {list(length.shape)}")
        check.tensor("length", length, "B,P,N", INTEGERS, anchors.device)
        _check_values(anchors, lo, length, rows)
        return cls(_copy(anchors), _copy(lo), _copy(length), rows, own)

    @classmethod
    def packed(
        cls,
        anchors: Tensor,
        lengths: Tensor,
        text_length: int | None = None,
        lo: Tensor | None = None,
        rows: int | None = None,
        own: str = "causal",
    ) -> ThoughtLayout:
        """Branches of unequal length, whose rows stand one after another without padding; any number on an anchor.

        P is C, and N is 1. Rows after a batch row's own sum of lengths are off.

        Args:
            anchors: int32 or int64 [B,C], ascending in each row, -1 in unused places at the end. Repeat a position for several
                branches on it.
            lengths: int32 or int64 [B,C], rows of each branch; 0 where unused.
            text_length: L; not needed if ``lo`` is given.
            lo: int32 or int64 [B,L], 0 <= lo[b,t] <= t; default 0.
            rows: R; default the largest sum of lengths (on a GPU, this waits for the device).
            own: "causal", or "full": a row sees all rows of its own branch.

        Raises:
            ValueError: an argument with a wrong size, shape, dtype or value.
        """
        check = Checker(OP)
        check.tensor("anchors", anchors, "B,C", INTEGERS)
        check.tensor("lengths", lengths, "B,C", INTEGERS, anchors.device, "anchors")
        _check_text(check, "packed", text_length, lo, anchors.device)
        if rows is not None:
            rows = check.integer("rows", rows, 0)
        _check_packed_sizes(check, check["C"], rows or 0)
        if lo is None:
            lo = torch.zeros((check["B"], check["L"]), dtype=torch.int32, device=anchors.device)
        check.tensor("lo", lo, "B,L", INTEGERS, anchors.device)
        most = rows  # of a branch
        if rows is None or (on_host(lengths) and not torch.compiler.is_compiling()):
            if not has_values(lengths):
                raise check.fail("rows must be given if lengths have no values, got a meta, fake or traced tensor")
            most, total = [0, 0]
            if lengths.numel():  # the longest counts too, since a sum may pass 64 bits
                most, total = torch.stack([lengths.amax(), lengths.long().sum(1).amax()]).tolist()
                _check_packed_sizes(check, check["C"], max(most, 0))
            rows = max(total, 0) if rows is None else rows
        _check_values(anchors, lo, lengths, rows, packed=True)
        return cls(_copy(anchors), _copy(lo), _copy(lengths)[..., None], max(most or 0, 1), own, rows)

    @classmethod
    def tree(
        cls,
        anchors: Tensor,
        parents: Tensor,
        lengths: Tensor,
        text_length: int | None = None,
        lo: Tensor | None = None,
        rows: int | None = None,
        own: str = "causal",
    ) -> ThoughtLayout:
        """Branches that go on from the end of other branches, their parents, as turns of a dialogue do.

        A row also sees all rows of its parent, and of the parent's parent. What goes on from the middle of a branch makes two.

        Nodes stand in depth-first order: each after its parent, and a subtree together. Without parents this is ``packed``.

        Args:
            anchors: int32 or int64 [B,C], the text positions of nodes without a parent, ascending in each row; -1 in unused
                places at the end. Those of other nodes are not looked at.
            parents: int32 or int64 [B,C], the place of each node's parent, -1 for a node on the text and in unused places.
            lengths: int32 or int64 [B,C], rows of each node, 0 too; 0 where unused.
            text_length, lo, rows: as in ``packed``.
            own: "causal", or "full": rows of a node that is nobody's parent see each other.

        Raises:
            ValueError: an argument with a wrong size, shape, dtype or value.
        """
        check = Checker(OP)
        check.tensor("anchors", anchors, "B,C", INTEGERS)
        check.tensor("parents", parents, "B,C", INTEGERS, anchors.device, "anchors")
        check.tensor("lengths", lengths, "B,C", INTEGERS, anchors.device, "anchors")
        node = torch.arange(check["C"], device=anchors.device)
        early = (parents < -1) | (parents >= node)
        _refuse(early, "parents must be -1 or come before their children", parents)
        parents = torch.where(early, -1, parents).int()  # on a GPU nothing was raised
        tree, together = tree_of(parents, lengths)
        _refuse(~together, "parents must make depth-first order, with all nodes below a node next to it", parents)
        root = torch.where(parents < 0, node, 0).cummax(1).values if check["C"] else node.expand_as(anchors)
        layout = cls.packed(anchors.gather(1, root), lengths, text_length, lo, rows, own)
        most = layout.rows
        if lengths.numel() and (rows is None or (on_host(lengths) and not torch.compiler.is_compiling())):
            most = max(int((tree[..., DEPTH] + lengths).amax()), 1)
        return replace(layout, parent=parents, rows=most)

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[Sequence[int] | Tensor], device: torch.device | str | None = None
    ) -> tuple[ThoughtLayout, Tensor, list[Tensor]]:
        """The tree of token sequences, in which each token that several of them begin with is one row (their prefix trie).

        What sequences with the same first token begin with, up to where two of them part, is a document of the text; B is 1.
        Computed on the host.

        Args:
            sequences: token ids of each, as lists or integer tensors [T].
            device: of the results.

        Returns:
            The layout, the tokens int64 [1,M] of its rows, and for each sequence the rows int64 [T] of its tokens.

        Raises:
            ValueError: a sequence that isn't integers [T].
        """
        given = Checker(f"{OP}.from_sequences").sequences(sequences)
        # One more column is the root, with which all sequences begin; one more row has nothing else.
        root, none = torch.zeros(1, dtype=torch.int64, device="cpu"), torch.iinfo(torch.int64).min
        if any(bool((ids == none).any()) for ids in given):
            raise ValueError(f"{OP}.from_sequences: ids must be above -2^63")
        padded = pad_sequence([root, *(torch.cat([root, ids]) for ids in given)], True, none)
        ordered, of = padded.unique(dim=0, return_inverse=True)
        new = ordered != none
        new[1:] &= (ordered[1:] == ordered[:-1]).cumprod(1) == 0  # not in what the sequence before begins with
        # New tokens in depth-first order, the root is row 0. Another token has the row of the last new one above it.
        row = torch.where(new, new.flatten().cumsum(0).view_as(new) - 1, 0).cummax(0).values
        parent = row[:, :-1][new[:, 1:]]  # of rows 1 to M
        first = (parent == 0) | (parent.bincount(minlength=len(parent) + 1)[parent] > 1)  # rows that begin a node
        node = first.cumsum(0) - 1
        lengths, up = node.bincount(), node[parent[first] - 1]  # of nodes
        text = parent[first] == 0  # nodes that are documents; their ``up`` means nothing
        in_text = text[node]
        place = torch.where(in_text, in_text.cumsum(0), in_text.sum() + (~in_text).cumsum(0)) - 1
        tokens = torch.empty_like(place).scatter(0, place, ordered[new][1:])
        ends = lengths[text].cumsum(0)
        lo = (ends - lengths[text]).repeat_interleave(lengths[text])
        anchors = ends[text.cumsum(0) - 1] - 1
        parents = torch.where(text[up], -1, (~text).cumsum(0)[up] - 1)
        anchors, parents, lengths = (x[None, ~text] for x in (anchors, parents, lengths))
        if (parents >= 0).any():
            layout = cls.tree(anchors, parents, lengths, lo=lo[None])
        else:
            layout = cls.packed(anchors, lengths, lo=lo[None])
        rows = [place[x[1 : len(ids) + 1] - 1] for x, ids in zip(row[of[1:]], given, strict=True)]
        return layout.to(device or "cpu"), tokens[None].to(device), [x.to(device) for x in rows]

    @classmethod
    def from_padding(
        cls, attention_mask: Tensor, thoughts: int, rows: int, anchors: Tensor | None = None, own: str = "causal"
    ) -> ThoughtLayout:
        """Text with padding on the left, the right or both sides. The thoughts of a padded anchor are off.

        Args:
            attention_mask: bool or integer [B,L], 1 for text and 0 for padding; the ones of a row are contiguous.
            anchors: as in ``at``; default every position.
            own: as in ``at``.

        Raises:
            ValueError: as in ``at``, or padding inside the text.
        """
        check = Checker(OP)
        check.tensor("attention_mask", attention_mask, "B,L", MASKS)
        _check_grid_sizes(check, thoughts, rows)
        live = attention_mask != 0
        if live.numel():
            starts = (live[:, 1:] & ~live[:, :-1]).sum(1) + live[:, 0]
            _refuse_rows(starts > 1, "attention_mask must have its ones together", "has padding inside the text")
        return cls._from_text_runs(live.int() - 1, live, thoughts, rows, anchors, own)

    @classmethod
    def from_documents(
        cls, document_ids: Tensor, thoughts: int, rows: int, anchors: Tensor | None = None, own: str = "causal"
    ) -> ThoughtLayout:
        """Packed documents: no row sees another document. Ids [0,0,0,1,1] give lo [0,0,0,3,3].

        Args:
            document_ids: integer [B,L]; the positions of a document are contiguous; a negative id marks padding.
            anchors: as in ``at``; default every position.
            own: as in ``at``.

        Raises:
            ValueError: as in ``at``, or a document in two pieces.
        """
        check = Checker(OP)
        check.tensor("document_ids", document_ids, "B,L", INTEGERS)
        _check_grid_sizes(check, thoughts, rows)
        if document_ids.numel():
            runs, documents = (_live_runs(ids) for ids in (document_ids, document_ids.sort(1).values))
            _refuse_rows(runs > documents, "document_ids must keep a document together", "has one in two pieces")
        return cls._from_text_runs(document_ids, document_ids >= 0, thoughts, rows, anchors, own)

    @classmethod
    def _from_text_runs(
        cls, ids: Tensor, live: Tensor, thoughts: int, rows: int, anchors: Tensor | None, own: str
    ) -> ThoughtLayout:
        """lo is the first position of the run of equal ids; padding before the last text position sees only itself."""
        B, L = ids.shape
        t = torch.arange(L, device=ids.device).expand(B, L)
        new_run = torch.ones_like(live)
        new_run[:, 1:] = ids[:, 1:] != ids[:, :-1]
        lo = torch.where(new_run, t, 0).cummax(1).values if L else t
        text_follows = live.flip(1).cummax(1).values.flip(1) if L else live
        lo = torch.where(live, lo, t)
        # Padding on the right is ordinary causal text after the last document: no live row sees it.
        last_lo = torch.where(live, lo, 0).amax(1, keepdim=True) if L else lo
        lo = torch.where(live | text_follows, lo, last_lo)
        if anchors is None:
            anchors = t
        Checker(OP, B=B).tensor("anchors", anchors, "B,P", INTEGERS, ids.device)
        on = live.gather(1, anchors.long().clamp(0, max(L - 1, 0))) if L else torch.zeros_like(anchors, dtype=torch.bool)
        length = torch.where(on, rows, 0)[:, :, None].expand(-1, -1, thoughts)
        return cls.at(anchors, thoughts, rows, lo=lo, length=length, own=own)

    def row_anchor(self) -> Tensor:
        """int64 [B,R]: the text position that each thought row belongs to; 0 where the row is off."""
        return self.branches.column(ANCHOR)

    def branch_of_row(self) -> Tensor:
        """int32 [B,R]: the thought p*N + n, or the branch, of each thought row; -1 where the row is off."""
        return self.branches.of_row

    def row_in_branch(self) -> Tensor:
        """int32 [B,R]: which row of its thought or branch each thought row is, from 0; -1 where the row is off."""
        return self.branches.row_in_branch()

    def live(self) -> Tensor:
        """bool [B,P,N,S]: True for the thought rows that are on; [B,R] if packed."""
        live = self.branches.live()
        return live if self.packed_rows is not None else live.view(self.B, self.P, self.N, self.S)

    def text_position_ids(self) -> Tensor:
        """int64 [B,L]: t - lo[b,t]."""
        return self.branches.text_position_ids()

    def position_ids(self) -> Tensor:
        """int64 [B,M]: t - lo[b,t] for text; that of the anchor + 1 + s for a thought row; 0 for rows that are off. In a tree
        the rows of a node go on from those of its parent. Made once, so don't write to it."""
        return self.table(POSITIONS, lambda layout: layout.branches.position_ids())

    def token_ids(self, input_ids: Tensor, thought_ids: Tensor, start_id: int, end_id: int, pad_id: int) -> Tensor:
        """The tokens of the packed sequence, int64 [B,M].

        The rows of a thought hold the start token, its T sampled tokens, the end token and, for teacher forcing, the
        J-1 = S-T-2 text tokens after its anchor; ``pad_id`` after the end of the text and in unused places.

        Args:
            input_ids: integer [B,L].
            thought_ids: integer [B,P,N,T].

        Raises:
            ValueError: a wrong shape or dtype, or S < T + 2.
        """
        check = self._grid_only(Checker("ThoughtLayout.token_ids", B=self.B, L=self.L, P=self.P, N=self.N))
        check.tensor("input_ids", input_ids, "B,L", INTEGERS, self.device)
        check.tensor("thought_ids", thought_ids, "B,P,N,T", INTEGERS, self.device)
        for name, token in (("start_id", start_id), ("end_id", end_id), ("pad_id", pad_id)):
            check.integer(name, token)
        forced = self.S - check["T"] - 2
        if forced < 0:
            raise check.fail(f"rows S must be at least T+2={check['T'] + 2}, got {self.S}")
        if self.R == 0:
            return input_ids.long()
        if self.L == 0:  # all thoughts are off
            return torch.full((self.B, self.R), pad_id, dtype=torch.int64, device=self.device)
        shape = (self.B, self.P, self.N)
        following = self.anchor.long()[:, :, None] + torch.arange(1, forced + 1, device=self.device)
        inside = (following < self.L) & (self.anchor >= 0)[:, :, None]
        text = input_ids.long().gather(1, following.clamp(0, self.L - 1).flatten(1)).view(following.shape)
        text = torch.where(inside, text, pad_id)[:, :, None].expand(*shape, forced)
        mark = thought_ids.new_empty((*shape, 1), dtype=torch.int64)
        thought = torch.cat([mark.fill_(start_id), thought_ids.long(), torch.full_like(mark, end_id), text], -1)
        thought = torch.where((self.anchor >= 0)[:, :, None, None], thought, pad_id)
        return torch.cat([input_ids.long(), thought.flatten(1)], 1)

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the text [B,L,...] and of the thoughts [B,P,N,S,...], or [B,R,...] if packed: views of ``packed``.

        Args:
            packed: [B,M,...], of any dtype, such as hidden states.

        Raises:
            ValueError: a wrong shape.
        """
        Checker("ThoughtLayout.split", B=self.B, M=self.M).leading("packed", packed, "B,M")
        text, thoughts = packed.split([self.L, self.R], 1)
        return text, thoughts if self.packed_rows is not None else thoughts.unflatten(1, (self.P, self.N, self.S))

    def predicting(self, packed: Tensor, lookahead: int) -> Tensor:
        """The rows [B,P,N,J,...] that predict the J tokens after each anchor: the end row of a thought, and those after it.

        ``targets`` are what they predict:

            logits = head(layout.predicting(hidden, J))  # [B,P,N,J,V]
            loss = F.cross_entropy(logits.flatten(0, -2), layout.targets(text, J).flatten())

        Args:
            packed: [B,M,...], of any dtype.
            lookahead: J, from 1 to S.

        Raises:
            ValueError: a wrong shape or number.
        """
        check = self._grid_only(Checker("ThoughtLayout.predicting", B=self.B, M=self.M))
        check.leading("packed", packed, "B,M")
        return self.split(packed)[1][:, :, :, self.S - self._lookahead(check, lookahead) :]

    def targets(self, labels: Tensor, lookahead: int) -> Tensor:
        """int64 [B,P,N,J]: the labels of the J positions after each anchor.

        They are -100 after the end of the text, in another document, and where the row that predicts them is off. A layout
        doesn't know padding on the right: set its labels to -100.

        Args:
            labels: integer [B,L], the ids of the text; -100 stays.
            lookahead: J, from 1 to S.

        Raises:
            ValueError: a wrong shape, dtype or number.
        """
        check = self._grid_only(Checker("ThoughtLayout.targets", B=self.B, L=self.L))
        check.tensor("labels", labels, "B,L", INTEGERS, self.device)
        J = self._lookahead(check, lookahead)
        if self.L == 0:  # all thoughts are off
            return torch.full((self.B, self.P, self.N, J), IGNORED, dtype=torch.int64, device=self.device)
        anchor = self.anchor.long()[:, :, None]
        ahead = anchor + torch.arange(1, J + 1, device=self.device)  # [B,P,J]
        index = ahead.clamp(0, self.L - 1).flatten(1)
        label, lo = (x.long().gather(1, index).view(ahead.shape) for x in (labels, self.lo))
        there = (ahead < self.L) & (lo <= anchor)
        on = there[:, :, None] & self.live()[..., self.S - J :]
        return torch.where(on, label[:, :, None], IGNORED)

    def _lookahead(self, check: Checker, lookahead: int) -> int:
        return check.integer("lookahead", lookahead, 1, self.S, f"from 1 to S={self.S}")

    def dense_mask(self, window: int | None = None) -> Tensor:
        """bool [B,M,M], True where the row sees the column. This is the definition, for tests and plots of small sizes.

        With a ``window`` W, a row at position id q sees only rows at position ids above q - W, both text and own rows.
        """
        return self.branches.dense_mask(Checker("ThoughtLayout.dense_mask").window(window))

    def text_only(self) -> ThoughtLayout:
        """The same text without thoughts: P = 0, M = L."""
        return ThoughtLayout(self.anchor[:, :0], self.lo, self.length[:, :0, :1], self.rows, self.own)

    def select(self, places: slice) -> ThoughtLayout:
        """The same text with only some of the anchors. Raises ValueError for a packed layout."""
        self._grid_only(Checker("ThoughtLayout.select"))
        check_instance("ThoughtLayout.select", "places", places, slice)
        return ThoughtLayout(self.anchor[:, places], self.lo, self.length[:, places], self.rows, self.own)

    def chunks(self, size: int) -> list[slice]:
        """The places of the anchors in runs of ``size``, for ``select``; one empty run where P is 0."""
        return [slice(first, min(first + size, self.P)) for first in range(0, max(self.P, 1), size)]

    def to(self, device: torch.device | str, **kwargs: Any) -> ThoughtLayout:
        """The layout on another device; keyword arguments go to ``Tensor.to``."""
        device = Checker("ThoughtLayout.to").device(device)
        return self.map(lambda x: x.to(device, **kwargs))

    def map(self, function: Callable[[Tensor], Tensor]) -> ThoughtLayout:
        """With ``function``, which copies tensors, of each: also of what was made from the layout for all back ends."""
        own: dict[str, Any] = {name: function(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        layout = replace(self, **own)
        if self._made is not None:
            branches = Branches._make(function(x) if isinstance(x, Tensor) else x for x in self._made.branches)
            tables = {name: function(x) for name, x in self._made.tables.items() if name == POSITIONS}
            if layout._made is None:  # other tensors
                object.__setattr__(layout, "_made", _Made(layout, branches, tables))
        return layout

    def _grid_only(self, check: Checker) -> Checker:
        if self.packed_rows is not None:
            raise check.fail("the layout must be a grid of P*N thoughts, got a packed one")
        return check

    def __repr__(self) -> str:
        sizes = " ".join(f"{letter}={getattr(self, letter)}" for letter in "BLPNSRM")
        packed = "" if self.packed_rows is None else " packed" if self.parent is None else " tree"
        kind = packed + f" own={self.own}" * (self.own != "causal")
        return f"ThoughtLayout({sizes}{kind}, device={self.device})"


def _own_fields(layout: ThoughtLayout) -> tuple:
    return layout.anchor, layout.lo, layout.length, layout.rows, layout.own, layout.packed_rows, layout.parent


def _copy(x: Tensor) -> Tensor:
    """int32, contiguous, and not the caller's memory, which may be filled again."""
    return x.to(torch.int32, copy=True, memory_format=torch.contiguous_format)


def _trainable(x: Tensor) -> Tensor:
    """A copy of a tensor that was made in ``torch.inference_mode``, which no backward may save; other tensors as they are."""
    if torch.compiler.is_compiling() or not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()


def _check_text(check: Checker, function: str, text_length: int | None, lo: Tensor | None, device: torch.device) -> None:
    """Sets L. ``lo`` is checked if it is the only one that gives it."""
    if text_length is not None:
        check.sizes["L"] = check.integer("text_length", text_length, 0)
    elif lo is None:
        raise check.fail(f"{function}() needs lo or text_length")
    else:
        check.tensor("lo", lo, "B,L", INTEGERS, device)


def _check_grid_sizes(check: Checker, thoughts: int, rows: int) -> None:
    """Sets N. Where P is not set, every position is an anchor."""
    if type(thoughts) is int and thoughts == 0:
        instead = "every_position(batch, text_length, 1, 1).text_only() is causal attention without thoughts"
        raise check.fail(f"thoughts N must be an integer of at least 1, got 0: {instead}")
    N, S = check.integer("thoughts N", thoughts, 1), check.integer("rows S", rows, 1)
    B, L, P = check["B"], check["L"], check.sizes.get("P", check["L"])
    if (M := L + P * N * S) > MOST_ROWS or B * P * N > MOST_ROWS:
        sizes = f"batch B={B:,}, text_length L={L:,}, P={P:,}, thoughts N={N:,}, rows S={S:,}"
        raise check.fail(f"L+P*N*S and B*P*N must be at most {MOST_ROWS:,}, got {M:,} and {B * P * N:,} with {sizes}")
    check.sizes["N"] = N


def _check_packed_sizes(check: Checker, C: int, rows: int) -> None:
    B, L = check["B"], check["L"]
    if L + rows > MOST_ROWS or B * C > MOST_ROWS:
        sizes = f"batch B={B:,}, text_length L={L:,}, rows R={rows:,}, C={C:,}"
        raise check.fail(f"L+R and B*C must be at most {MOST_ROWS:,}, got {L + rows:,} and {B * C:,} with {sizes}")


def _check_values(anchor: Tensor, lo: Tensor, length: Tensor, rows: int, packed: bool = False) -> None:
    """Raises ValueError for the first rule that is broken."""
    L = lo.shape[1]
    earlier, later = anchor[:, :-1], anchor[:, 1:]
    _refuse((anchor < -1) | (anchor >= L), "anchors must be from -1 to L-1", anchor, L - 1)
    unordered = (later != -1) & ((later < earlier) | (earlier == -1))
    _refuse(unordered, "anchors must ascend, with -1 only at the end", anchor)
    _refuse((lo < 0) | (lo > torch.arange(L, device=lo.device)), "lo must satisfy 0 <= lo[b,t] <= t", lo)
    if packed:
        _refuse(length < 0, "lengths must not be negative", length)
        _refuse((anchor == -1) & (length > 0), "lengths must be 0 where anchors hold -1", length)
        _refuse(length.long().sum(1) > rows, "the sum of lengths must be at most rows R", length, rows)
    else:
        _refuse((length < 0) | (length > rows), "length must be from 0 to rows S", length, rows)


def _refuse(wrong: Tensor, rule: str, tensor: Tensor, bound: int | None = None) -> None:
    if bound is not None and _is_known(bound):
        rule += f"={bound}"
    refuse_where(wrong, f"{OP}: {rule}", lambda: f", broken at {wrong.nonzero()[0].tolist()} of shape {list(tensor.shape)}")


def _is_known(size: int) -> bool:
    """Whether torch.compile knows it already; in a text, another one would need a graph for each value."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import

    return has_static_value(size)


def _refuse_rows(wrong: Tensor, rule: str, broken: str) -> None:
    refuse_where(wrong, f"{OP}: {rule}", lambda: f", row {int(wrong.nonzero()[0])} {broken}")


def _live_runs(ids: Tensor) -> Tensor:
    """int64 [B]: in how many runs of equal ids, none of them negative, each row falls."""
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return (first & (ids >= 0)).sum(1)
