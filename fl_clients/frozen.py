"""A role's state as bytes and back: what a vault writes to its own disk after a step, to go on after a kill.

Closed forms only: plain values, numpy arrays, the frozen dataclasses and secret classes listed here. Nothing is
imported or called by name from the bytes (no pickle), and an object that is not listed, or that gained an attribute
since, is `Refused` when it is frozen, not forgotten. The bytes are secret; `checkpoint` encrypts and authenticates
them. Noise shares are not kept: a share is drawn inside a step whose reply either was stored or never left.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import msgpack
import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl_clients import bank as bank_module
from fl_clients.bank import Bank
from fl_clients.contract import Contract
from fl_clients.data import AlignedRows, Consent, LabelledRows, OwnerData
from fl_clients.feature_owner import FeatureOwner
from fl_clients.matching import Matching
from fl_clients.protocol import Step, StepKind
from fl_clients.roster import Announcement, Roster
from fl_clients.session import Session
from models.binning import ColumnSpec, FeatureBins, Tower
from models.score_histogram import ScoreHistogram
from models.shared_bins import SharedBinning
from privacy.blind_aggregate import BankKey, Layout, OwnerDesign
from privacy.errors import Refused
from privacy.masks import OneTimePad
from privacy.noise import ForwardNoise, KeyedForwardNoise, NoiseSource
from privacy.parameters import BFVParameters
from privacy.private_set_intersection import Exchange, Publisher, Querier, Sizes, TwoWaySide, _Inbox, _List
from privacy.ristretto import Scalar
from privacy.sealing import JobKeys
from privacy.secure_sum import ConsortiumKey

VALUES: tuple[type[Any], ...] = (
    *(LabelledRows, AlignedRows, Announcement, ColumnSpec, FeatureBins, Tower, SharedBinning, ScoreHistogram),
    *(BFVParameters, Exchange, Sizes, bank_module._Pending),
)
"""Frozen dataclasses: rebuilt by their constructor, which checks them again."""

STATES: Mapping[type[Any], tuple[str, ...]] = {
    OneTimePad: ("_pads", "_erased"),
    _List: ("rows", "source", "messages"),
    _Inbox: ("what", "entries", "_data", "_seen", "_checked"),
    TwoWaySide: (*("_list", "_exchange", "_sizes", "_workers", "_scalar", "_own", "_own_tags", "_points", "_tags"),),
    Publisher: (
        *("_list", "_exchange", "_size", "_bucket", "_largest", "_workers", "_scalar", "_values", "_claims"),
        *("_queries", "_answers", "_claimed"),
    ),
    Querier: (*("_list", "_exchange", "_sizes", "_workers", "_blind", "_queries", "_values", "_answers", "_own"),),
}
"""Classes with a state: exactly these attributes."""

MATCHING = ("_is_bank", "_peers", "_form", "_two_way", "_queriers", "_publisher")

_NAMED: Mapping[str, type[Any]] = {kind.__name__: kind for kind in (*VALUES, *STATES)}
_OUTSIDE = frozenset({"_contract", "_noise", "_consent", "_session", "_matching", "_designs", "_data"})
"""Attributes of a role that are given anew or frozen in a form of their own."""


def encode(value: object) -> bytes:
    """Injective bytes of a value; `Refused` for anything of another type."""
    return bytes(msgpack.packb(_plain(value)))


def decode(data: bytes) -> Any:
    """The value again. Only for bytes that are authentic: they come from this vault's own sealed checkpoint."""
    return _value(msgpack.unpackb(data, max_bin_len=1 << 31, strict_map_key=False))


def _plain(value: Any) -> Any:
    """[tag, content] of MessagePack's own types."""
    kind = type(value)
    if value is None or kind in (bool, float, str, bytes):
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 63 else ["int", str(value)]
    if kind in (list, tuple, set, frozenset):
        items = [_plain(item) for item in value]
        return [kind.__name__, sorted(items, key=msgpack.packb) if kind in (set, frozenset) else items]
    if kind is dict:
        return ["dict", [[_plain(key), _plain(item)] for key, item in value.items()]]
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return ["objects", list(value.shape), [_plain(item) for item in value.ravel().tolist()]]
        return ["array", value.dtype.str, list(value.shape), np.ascontiguousarray(value).tobytes()]
    if isinstance(value, np.generic):
        return ["scalar", value.dtype.str, value.tobytes()]
    if kind is Fraction:
        return ["fraction", str(value.numerator), str(value.denominator)]
    if kind is Step:
        return ["step", str(value.kind), value.round_number, value.index]
    if kind is Scalar:
        buffer = value._buffer
        return ["secret scalar", None if buffer is None else bytes(buffer.raw)]
    if kind in VALUES:
        fields = {name: item for name, item in vars(value).items() if name in kind.__dataclass_fields__}
        return ["value", kind.__name__, {name: _plain(item) for name, item in fields.items()}]
    if kind in STATES:
        return ["state", kind.__name__, {name: _plain(item) for name, item in attributes(value, STATES[kind]).items()}]
    raise Refused(f"the checkpoint has no form for a {kind.__name__}; list it in fl_clients/frozen.py")


def _value(plain: Any) -> Any:
    if not isinstance(plain, list):
        return plain
    match plain:
        case ["int", text]:
            return int(text)
        case ["list", items]:
            return [_value(item) for item in items]
        case ["tuple", items]:
            return tuple(_value(item) for item in items)
        case ["set", items]:
            return {_value(item) for item in items}
        case ["frozenset", items]:
            return frozenset(_value(item) for item in items)
        case ["dict", pairs]:
            return {_value(key): _value(item) for key, item in pairs}
        case ["objects", shape, items]:
            array = np.empty(len(items), object)
            array[:] = [_value(item) for item in items]
            return array.reshape(shape)
        case ["array", dtype, shape, data]:
            return np.frombuffer(data, np.dtype(dtype)).reshape(shape).copy()
        case ["scalar", dtype, data]:
            return np.frombuffer(data, np.dtype(dtype))[0]
        case ["fraction", numerator, denominator]:
            return Fraction(int(numerator), int(denominator))
        case ["step", kind, round_number, index]:
            return Step(kind=StepKind(kind), round_number=round_number, index=index)
        case ["secret scalar", data]:
            scalar = Scalar(data)
            if data is None:
                scalar.erase()
            return scalar
        case ["value", name, fields]:
            return _NAMED[name](**{field: _value(item) for field, item in fields.items()})
        case ["state", name, fields]:
            return _restored(_NAMED[name], {field: _value(item) for field, item in fields.items()})
        case _:
            raise Refused("a checkpoint of another version of this program; end the job and start it again")


def attributes(value: object, names: tuple[str, ...]) -> dict[str, Any]:
    """The attributes of an object, which must be exactly `names`: what is not listed would be lost by a restart."""
    if set(vars(value)) != set(names):
        changed = sorted(set(vars(value)) ^ set(names))
        raise Refused(f"{type(value).__name__} has other attributes than its checkpoint lists: {changed}")
    return dict(vars(value))


def _restored(kind: type[Any], state: Mapping[str, Any]) -> Any:
    restored = object.__new__(kind)
    for name, item in state.items():
        setattr(restored, name, item)
    return restored


# --- roles -----------------------------------------------------------------------------------------------------------


def freeze_role(role: Bank | FeatureOwner) -> dict[str, object]:
    """The whole state of a living role, by part. Parts are plain for `encode`; keys are in them."""
    parts: dict[str, object] = {
        name: value for name, value in vars(role).items() if name not in _OUTSIDE | {"_bank_key", "_consortium"}
    }
    session = role._session
    parts["session"] = _frozen_session(session)
    if role._matching is not None:
        state = {name: value for name, value in vars(role._matching).items() if name != "_session"}
        if set(state) != set(MATCHING):
            raise Refused("Matching has other attributes than its checkpoint lists; see fl_clients/frozen.py")
        parts["matching"] = state
    if isinstance(role, Bank):
        if role._bank_key is not None:
            key = role._bank_key
            parts["bank_key"] = (key.parameters, key.secret_bytes(), key.public)
        if role._consortium is not None:
            parts["consortium"] = (role._consortium.parameters, role._consortium.secret_bytes())
    else:
        parts["ids"] = role._data.ids
        parts["columns"] = dict(role._data.columns)
        # a design follows from cells, layout and the bank's key
        parts["layouts"] = {
            bank: (*_layout(design.layout), design.parameters) for bank, design in role._designs.items()
        }
        if isinstance(role._noise, KeyedForwardNoise):
            parts["forward_noise"] = role._noise._secret
    return parts


def thaw_bank(parts: Mapping[str, Any], *, name: str, contract: Contract, consent: Consent, noise: NoiseSource) -> Bank:
    """The bank as it stood after the step; `consent` and `noise` are given as to a new one."""
    bank: Bank = _restored(Bank, _own(parts))
    bank._contract, bank._consent, bank._noise = contract, consent, noise
    _check_name(bank._name, name)
    bank._session = _thawed_session(parts["session"], contract, name)
    bank._matching = _thawed_matching(parts, bank._session)
    bank._bank_key = bank._consortium = None
    if "bank_key" in parts:
        bank._bank_key = BankKey.restored(*parts["bank_key"])
    if "consortium" in parts:
        bank._consortium = ConsortiumKey(*parts["consortium"])
    return bank


def thaw_owner(
    parts: Mapping[str, Any], *, name: str, contract: Contract, consent: Consent, noise: ForwardNoise | None = None
) -> FeatureOwner:
    """The owner as it stood. `noise` None: the forward noise of the job's own secret, which the state holds."""
    owner: FeatureOwner = _restored(FeatureOwner, _own(parts))
    owner._contract = contract
    _check_name(owner._name, name)
    if noise is None and "forward_noise" not in parts:
        raise Refused(f"the checkpoint of {name} holds no forward noise; give the source that the job began with")
    owner._noise = noise if noise is not None else KeyedForwardNoise(parts["forward_noise"])
    owner._data = OwnerData(ids=parts["ids"], columns=parts["columns"], consent=consent)
    owner._session = _thawed_session(parts["session"], contract, name)
    owner._matching = _thawed_matching(parts, owner._session)
    owner._designs = {
        bank: OwnerDesign(
            owner._cells[bank],
            Layout(samples=samples, rows=rows, rows_per_ciphertext=packing, degree=degree),
            parameters,
            owner._bank_keys[bank],
        )
        for bank, (samples, rows, packing, degree, parameters) in parts["layouts"].items()
    }
    return owner


_FORMS = frozenset({"session", "matching", "bank_key", "consortium", "ids", "columns", "layouts", "forward_noise"})


def _own(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parts.items() if name not in _FORMS}


def _check_name(found: str, name: str) -> None:
    if found != name:
        raise Refused(f"the checkpoint is that of {found}, not of {name}; give the folder of this institution's job")


def _layout(layout: Layout) -> tuple[int, int, int, int]:
    return layout.samples, layout.rows, layout.rows_per_ciphertext, layout.degree


def _frozen_session(session: Session) -> tuple[bytes, dict[str, Announcement] | None]:
    roster = session._roster
    return session.keys.private_bytes(), None if roster is None else dict(roster.announcements)


def _thawed_session(frozen: Any, contract: Contract, name: str) -> Session:
    secret, announcements = frozen
    session = Session(contract, name)
    session.keys = JobKeys(X25519PrivateKey.from_private_bytes(secret))
    if announcements is not None:
        session._roster = Roster(contract, announcements)
    return session


def _thawed_matching(parts: Mapping[str, Any], session: Session) -> Matching | None:
    if "matching" not in parts:
        return None
    matching: Matching = _restored(Matching, parts["matching"])
    matching._session = session
    return matching
