"""Folders that are not people: parts of a dataset, dates, shards, collections."""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum


class FolderKind(Enum):
    """What a folder's name says about the folder, as notes put it."""

    PERSON = "people"
    SPLIT = "parts of a dataset"
    DATE = "dates"
    SHARD = "shards"
    COLLECTION = "collections"
    GROUP = "groups of people"
    NUMBER = "numbers"
    LETTER = "single letters"


# What a label may be.
PEOPLE = (FolderKind.PERSON, FolderKind.NUMBER, FolderKind.LETTER)

# Nobody has these names. Case does not matter.
_SPLIT = re.compile(
    r"(?:train|test|valid|eval|training|testing|validation|evaluation|trainval|holdout|probe|query|gallery|distractors?"
    r"|(?:train|test|val)[-_ ]?set|positive|negative|real|fake|live|spoof|(?:fe)?male|(?:wo)?m[ae]n|mask|(?:un)?masked"
    r"|(?:with|no|without)_mask|yes|no)",
    re.IGNORECASE,
)
# These are parts of a dataset in lower case; with a capital they are people as well.
_LOWER_SPLITS = frozenset({"val", "dev"})
_GROUP = re.compile(
    r"african|(?:(?:east|south|south[-_ ]?east)[-_ ])?asian|caucasian|indian|latino|hispanic|latino[-_ ]hispanic"
    r"|middle[-_ ]eastern|race_per_[0-9]+",
    re.IGNORECASE,
)
_COLLECTION = re.compile(
    r"(?:image|img|photo|picture|pic|face|crop|sample|example|download|upload|export|backup|screenshot|output|input|result"
    r"|archive|original|dataset|jpe?g|png|thumb|thumbnail|other|.*[-_ ](?:image|photo|picture|face|crop))s?"
    r"|aligned|.*_aligned|cropped|raw|data|webp|jpegimages|unknown|unlabell?ed|unsorted|misc|miscellaneous|various|camera"
    r"|dcim|te?mp|incoming|inbox|img_align_celeba|img_celeba|(?:new|untitled)[-_ ]folder",
    re.IGNORECASE | re.DOTALL,
)
# A word for a part of something, and its number: shard_0, part-00000-of-00010, set1.
_SHARD = re.compile(
    r"(?:shard|part|chunk|batch|split|fold|bucket|block|vol|volume|disk|disc|dir|folder|subset|group|page|archive|tar|set"
    r"|dataset|images?|imgs?|photos?|pics?|pictures?|frames?|crops?|faces?|train|test|val|data|cam|camera|img|video|clip)"
    r"s?[-_ .]*[0-9]+(?:[-_ .]of[-_ .][0-9]+)?(?:[-_ .].*)?"
    r"|(?:subjects|identities|people|persons|ids)[-_ ]*[0-9]+[-_][0-9]+.*",
    re.IGNORECASE,
)
_YEAR = r"(?:19|20)[0-9]{2}"
_MONTH_NUMBER = r"(?:0?[1-9]|1[0-2])"
_DAY = r"(?:0?[1-9]|[12][0-9]|3[01])"
# A year with a month or more, in either order, and whatever follows: 2024-05-01, 01.05.2024, 2024_05 Wedding.
_DATE = re.compile(
    rf"(?:{_YEAR}[-_. ]{_MONTH_NUMBER}(?:[-_. ]{_DAY})?|(?:{_DAY}[-_. ])?{_MONTH_NUMBER}[-_. ]{_YEAR}"
    rf"|{_YEAR}-?W[0-5][0-9]|{_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[-_ T][0-9]+|{_YEAR}[-_. ]Q[1-4])"
    r"(?:[-_. T,].*)?",
    re.IGNORECASE,
)
# Numbers that can be dates, if all folders are such numbers.
_DATE_NUMBER = re.compile(rf"{_YEAR}(?:(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])?)?")
_MONTH = re.compile(
    r"january|february|march|july|september|october|november|december|feb|apr|jul|sept?|oct|nov|dec",
    re.IGNORECASE,
)
# Months that are people's names as well: dates only beside another month.
_MONTHS_OR_PEOPLE = frozenset({"april", "may", "june", "august", "jan", "mar", "jun", "aug"})
_NUMBER = re.compile(r"[0-9]+", re.ASCII)
_NUMBERS = re.compile(r"[0-9]+(?:_[0-9]+)*", re.ASCII)
_HEX = re.compile(r"[0-9a-f]{2,3}|[0-9A-F]{2,3}")
# Numbers that are judged anew with each one that comes.
_LOOKED_AT = 64
# Two to four Chinese, Japanese or Korean characters: a full name has no more, and needs no space.
_CJK_NAME = re.compile("[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003fffd]{2,4}")
_CJK_COLLECTION = re.compile(
    "写真|寫真|画像|畫像|照片|图片|圖片|图像|圖像|相片|相册|相冊|相簿|影像|截图|截圖|头像|頭像|人脸|人臉|人像|人物|顔写真|アルバム|カメラ|ダウンロード|下载|下載|数据|數據"
    "|データ|样本|樣本|其他|家族|家庭|旅行|사진|얼굴|이미지|앨범|카메라|다운로드|데이터|기타|가족|여행"
)
_CAMERA_FOLDER = re.compile(r"[1-9][0-9]{2}[A-Z_]{5}")  # 100CANON, of the standard for cameras' cards


def classify_folder(name: str) -> FolderKind:
    """Classify a folder by its name alone. Numbers and letters need the names beside it to be judged."""
    if _SPLIT.fullmatch(name) or name in _LOWER_SPLITS:
        return FolderKind.SPLIT
    if _NUMBER.fullmatch(name):
        return FolderKind.NUMBER
    if _DATE.fullmatch(name) or _MONTH.fullmatch(name):
        return FolderKind.DATE
    if _SHARD.fullmatch(name):
        return FolderKind.SHARD
    if _GROUP.fullmatch(name):
        return FolderKind.GROUP
    if _COLLECTION.fullmatch(name) or _CJK_COLLECTION.fullmatch(name) or _CAMERA_FOLDER.fullmatch(name):
        return FolderKind.COLLECTION
    return FolderKind.LETTER if len(name) == 1 and name.isalpha() else FolderKind.PERSON


def is_numbered(name: str) -> bool:
    """Tell whether a name is a number, or numbers joined by `_`, or a short one of hexadecimal digits."""
    return _NUMBERS.fullmatch(name) is not None or _HEX.fullmatch(name) is not None


def may_be_date(name: str) -> bool:
    """Tell whether a name is a date, or a number that can be one, such as a year."""
    return classify_folder(name) is FolderKind.DATE or _DATE_NUMBER.fullmatch(name) is not None


class FolderJudge:
    """Judges from the names of folders that lie beside each other which of them are people.

    Names come one after another, in the order of a listing. Most are judged by themselves. Numbers are shards if they
    have leading zeros and are counted through, dates if all can be, and people otherwise. The only folder is nobody,
    unless its name can only be a person's.

    Attributes:
        names: The folders so far.
        is_certain: Whether names to come cannot change what the names so far are.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._people: list[str] = []
        self._numbers: list[str] = []
        self._has_month = False
        self._certain_people = 0
        self.is_certain = False

    def add(self, name: str) -> None:
        """Add the name of a folder that holds images."""
        if name in self.names:
            return
        self.names.add(name)
        kind = classify_folder(name)
        if kind is FolderKind.NUMBER:
            self._numbers.append(name)
        elif kind in (FolderKind.PERSON, FolderKind.LETTER):
            self._people.append(name)
            # Two people are enough, unless their names may turn out to be shards or months.
            self._certain_people += not (_HEX.fullmatch(name) or name.lower() in _MONTHS_OR_PEOPLE)
        self._has_month = self._has_month or _MONTH.fullmatch(name) is not None
        self.is_certain = self._certain_people > 1 or self._is_certain_of_numbers()

    def judge(self, others: Collection[str] = ()) -> "FolderVerdict":
        """Judge from the names so far.

        Args:
            others: folders that hold images which are not listed.
        """
        return FolderVerdict(
            is_only_one=len(self.names.union(others)) < 2,
            numbers=self._judge_numbers(),
            has_months=self._has_month,
            has_buckets=_are_buckets([*self._people, *self._numbers]),
        )

    def _is_certain_of_numbers(self) -> bool:
        # Of many numbers not every one is worth a look at all of them.
        count = len(self._numbers)
        is_due = 1 < count <= _LOOKED_AT or count.bit_count() == 1 < count
        return self.is_certain or (is_due and self._judge_numbers() is FolderKind.NUMBER)

    def _judge_numbers(self) -> FolderKind:
        """Judge folders whose names are numbers."""
        if not self._numbers:
            return FolderKind.NUMBER
        if all(_DATE_NUMBER.fullmatch(name) for name in self._numbers):
            return FolderKind.DATE
        has_zeros = any(name[0] == "0" and len(name) > 1 for name in self._numbers)
        is_counted = has_zeros and _are_counted([int(name) for name in self._numbers])
        return FolderKind.SHARD if is_counted else FolderKind.NUMBER


@dataclass(frozen=True)
class FolderVerdict:
    """Which folders of a listing are people.

    Attributes:
        is_only_one: Whether there is one folder.
        numbers: What folders are whose names are numbers.
        has_months: Whether a folder is a month, so that April, May, June and August are months too.
        has_buckets: Whether short hexadecimal names are shards.
    """

    is_only_one: bool
    numbers: FolderKind
    has_months: bool
    has_buckets: bool

    def is_person(self, name: str) -> bool:
        """Tell whether a folder is taken for a person."""
        return self.find_kind(name) in PEOPLE and (not self.is_only_one or _CJK_NAME.fullmatch(name) is not None)

    def find_kind(self, name: str) -> FolderKind:
        """Find out what a folder is."""
        if self.has_buckets and _HEX.fullmatch(name):
            return FolderKind.SHARD
        if self.has_months and name.lower() in _MONTHS_OR_PEOPLE:
            return FolderKind.DATE
        kind = classify_folder(name)
        return self.numbers if kind is FolderKind.NUMBER else kind


def _are_buckets(names: list[str]) -> bool:
    """Tell whether names are hexadecimal numbers of one length, such as the folders 00 to ff of a cache."""
    if len(names) < 2 or len({len(name) for name in names}) > 1 or not all(_HEX.fullmatch(name) for name in names):
        return False
    has_digit = any(character.isdecimal() for name in names for character in name)
    return has_digit and not all(name.isdecimal() for name in names)


def _are_counted(numbers: list[int]) -> bool:
    """Tell whether numbers are counted through from 0 or 1 by some step, with at most every other one left out."""
    ordered = sorted(set(numbers))
    if len(ordered) == 1:
        return ordered[0] <= 1
    step = math.gcd(*(number - ordered[0] for number in ordered))
    return ordered[0] in (0, 1, step) and (ordered[-1] - ordered[0]) // step + 1 <= 2 * len(ordered)
