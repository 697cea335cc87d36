"""Sources of films on disk: files, folders of pictures, DAVIS 2017, UCF101 and JHMDB."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from sslrun.data.examples import Batch
from sslrun.data.source import Source, SourceOptions, sources
from sslrun.data.specs import VideoSpec
from sslrun.data.stores import (
    IMAGE_SUFFIXES,
    FolderStore,
    Split,
    describe_local_folders,
    find_local_folder,
    is_of,
)
from sslrun.data.video.decoding import Framing
from sslrun.data.video.files import (
    DiskFilms,
    FilmFiles,
    FrameFolders,
    open_film_files,
    store_films,
)
from sslrun.data.video.films import ClipExamples, Films, draw_clips
from sslrun.errors import UserError

FILM_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
"""File endings of films."""
ASPECT = 16 / 9
"""Width over height of whole frames, as far as it is known before they are read."""


class ClipOptions(SourceOptions):
    """Options of clips that are drawn from films."""

    size: int = Field(64, ge=8, le=1024)
    """Side of the square frames, in pixels: the central square of a frame is resized to it."""
    frames: int = Field(4, ge=2)
    """Number of frames in a clip."""
    skip: int = Field(1, ge=1)
    """Distance between two frames of a clip, in frames of the film."""
    stride: int | None = Field(None, ge=1)
    """Distance between the first frames of two clips, in frames of the film; default: frames times
    skip, so that clips do not overlap."""

    @property
    def step(self) -> int:
        """The distance between the first frames of two clips."""
        return self.stride or self.frames * self.skip


class FilmOptions(ClipOptions):
    """Options of films on disk."""

    path: Path | None = None
    """Folder of the films; default: the folder of the set's name in SSLRUN_DATA or in data."""
    skip_corrupt: bool = False
    """Skip films that cannot be decoded and report their number, instead of ending the run."""
    whole: bool = False
    """Keep all of a frame: its shorter side is resized to size, and nothing is cut off. Such films
    are read from disk when they are needed. They serve to follow objects at full resolution."""


@dataclass(frozen=True)
class Reel:
    """The films of a split, and what is known of each."""

    films: DiskFilms
    labels: Tensor | None = None
    """(films,) int64: class of each film."""
    classes: tuple[str, ...] = ()
    scenes: Tensor | None = None
    """(films,) int64: films of one scene are akin; None: each film is a scene of its own."""


class FilmSource(Source):
    """Films on disk: decoded once and cached, or streamed if they are too many.

    If a set of films has no test split, whole films are carved for it, and for validation; from a
    single film, its end.
    """

    gives = VideoSpec
    Options = FilmOptions
    layout: ClassVar[str]
    """What the folder holds, for messages."""

    @abstractmethod
    def open(self, split: Split) -> Reel:
        """List the films of a split.

        Raises:
            UserError: they cannot be found or opened.
        """

    def load(self, split: Split) -> ClipExamples:
        if split not in self.splits:
            raise UserError(f"{self.name}: has no split '{split}', only {', '.join(self.splits)}")
        options = self.options
        reel = self.open(split)
        films, kept = store_films(reel.films, options.skip_corrupt, self.progress)
        follows = films.has_masks or films.has_points
        whole = follows and split == "test"
        clips = self._list_films(films) if whole else self._draw(films)
        labels = None if reel.labels is None else reel.labels[kept][clips[:, 0]]
        spec = VideoSpec(options.size, options.frames, width=self._width(films))
        sections = None
        if reel.scenes is not None:
            scenes = reel.scenes[kept]
            sections = torch.stack([scenes, torch.zeros_like(scenes), films.lengths], dim=1)
        return ClipExamples(films, clips, spec, labels, reel.classes, whole, sections)

    @property
    def _span(self) -> int:
        """Number of frames from the first one of a clip to its last one."""
        return (self.options.frames - 1) * self.options.skip + 1

    def _draw(self, films: Films) -> Tensor:
        return draw_clips(films, self.options.frames, self.options.skip, self.options.step)

    def _list_films(self, films: Films) -> Tensor:
        """List one clip (N, 3) for each film. Raises UserError if a film is shorter."""
        if (films.lengths < self._span).any():
            film = int(films.lengths.argmin())
            raise UserError(
                f"{films.names[film]}: has {int(films.lengths[film])} frames, but a clip spans "
                f"{self._span}: lower data.frames or data.skip"
            )
        return draw_clips(films, self.options.frames, self.options.skip, int(films.lengths.max()))

    def _width(self, films: Films) -> int | None:
        """Return the width of whole frames, if they are not square; that of the first film."""
        if not self.options.whole:
            return None
        width = films.read(0, torch.tensor([0])).shape[-1]
        return None if width == self.options.size else width

    def sketch(self, count: int) -> tuple[VideoSpec, Batch]:
        options = self.options
        width = round(options.size * ASPECT) if options.whole else options.size
        shape = (count, options.frames, 3, options.size, width)
        spec = VideoSpec(options.size, options.frames, width=width if options.whole else None)
        return spec, Batch(torch.randint(0, 256, shape, dtype=torch.uint8), None)

    def check_available(self) -> None:
        self.folder()

    def folder(self) -> Path:
        """Return the folder of the set. Raises UserError if there is none."""
        folder = self.options.path or find_local_folder(self.name)
        if folder is None or not folder.is_dir():
            where = "not on this machine" if folder is None else f"{folder}: no such folder"
            raise UserError(
                f"{self.name}: {where}: put {self.layout} at data/{self.name}, or name the folder "
                "with path"
            )
        return folder

    @property
    def framing(self) -> Framing:
        return Framing(self.options.size, self.options.whole)

    def open_files(self, paths: Sequence[str]) -> tuple[FilmFiles, Tensor]:
        """Open film files; returns also the indices (M,) of those that can be opened."""
        return open_film_files(paths, self.framing, self.options.skip_corrupt, self.progress)


# ---------------------------------------------------------------- films of the user


@sources.register("films")
class FilmFolder(FilmSource):
    """Film files in a folder; in subfolders for their classes, if they have labels."""

    task = "clips"
    layout = "film files, or train/<class>/ and test/<class>/ with film files,"

    @property
    def store(self) -> FolderStore:
        return FolderStore(self.folder(), suffixes=FILM_SUFFIXES, noun="films")

    @property
    def splits(self) -> tuple[Split, ...]:
        return self.store.splits

    def open(self, split: Split) -> Reel:
        listed = self.store.open(split)
        paths = [path for path in listed.images.files() if path is not None]
        films, kept = self.open_files(paths)
        labels = None if listed.labels is None else listed.labels[kept]
        return Reel(films, labels, listed.classes)

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "those of the folders train, val and test, if there are any; else a quarter "
            "of the films is carved for the test, and a tenth of the rest for validation",
            "searched": f"path; else {describe_local_folders(cls.name)}",
        }


@sources.register("frame-folders")
class FrameSource(FilmSource):
    """Films as folders of pictures, with masks of objects if there are any.

    Each folder that holds pictures is a film, whose frames are in the order of their names. Gray
    pictures get three equal channels.
    """

    task = "masks"
    layout = "a folder of pictures for each film"

    class Options(FilmOptions):
        masks: Path | None = None
        """Folder of masks, apart from path: a palette PNG for each picture, in the same subfolder
        and with the same name. A pixel is the number of its object, 0 for background, and 255 if it
        is not scored. Default: there are no masks."""

    options: Options

    @property
    def splits(self) -> tuple[Split, ...]:
        return self._store.splits

    @property
    def _store(self) -> FolderStore:
        return FolderStore(self.folder(), noun="pictures")

    def open(self, split: Split) -> Reel:
        by_folder: dict[Path, list[str]] = {}
        for file in self._store.list_files(split):
            by_folder.setdefault(Path(file).parent, []).append(file)
        masks, pictures = None, list(by_folder.values())
        if self.options.masks is not None:
            root = self.folder()
            places = [self.options.masks / folder.relative_to(root) for folder in by_folder]
            masks = _find_masks(pictures, places)
        names = [str(folder) for folder in by_folder]
        return Reel(FrameFolders(names, pictures, self.framing, masks))

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": FilmFolder.describe()["splits"],
            "labels": "masks of the objects in each frame, if there are any",
            "searched": f"path; else {describe_local_folders(cls.name)}",
        }


def list_pictures(folder: Path) -> list[str]:
    """List the pictures of a film in order. Raises UserError if there are none."""
    pictures = sorted(str(path) for path in folder.iterdir() if is_of(IMAGE_SUFFIXES, path.name))
    if not pictures:
        raise UserError(f"{folder}: holds no pictures: it should hold the frames of a film")
    return pictures


def _find_masks(films: Sequence[Sequence[str]], folders: Sequence[Path]) -> list[list[str]]:
    """Return the mask of each picture of each film. Raises UserError if one is missing."""
    masks = []
    for pictures, folder in zip(films, folders, strict=True):
        paths = [folder / f"{Path(picture).stem}.png" for picture in pictures]
        for path, picture in zip(paths, pictures, strict=True):
            if not path.is_file():
                raise UserError(f"{path}: no such file: it should be the mask of {picture}")
        masks.append([str(path) for path in paths])
    return masks


# ---------------------------------------------------------------- published sets


class Line(NamedTuple):
    """A line of a list: where it is, and its words."""

    where: str
    words: list[str]


def _read_list(path: Path) -> list[Line]:
    """Read the lines of a list that are not empty. Raises UserError if there are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    rows = [Line(f"{path}:{number}", line.split()) for number, line in enumerate(lines, start=1)]
    rows = [row for row in rows if row.words]
    if not rows:
        raise UserError(f"{path}: is empty: it should list the films of the split")
    return rows


def _check_listed(path: Path, line: Line) -> Path:
    """Return a path that a list names. Raises UserError if it does not exist."""
    if not path.exists():
        raise UserError(
            f"{line.where}: names {line.words[0]}, but there is no {path}: get the whole set"
        )
    return path


@sources.register("davis")
class Davis(FilmSource):
    """DAVIS 2017, films with masks of their objects. Pont-Tuset et al. 2017 (arXiv:1704.00675).

    Read from the folder DAVIS: JPEGImages/480p, Annotations/480p and ImageSets/2017. Its validation
    split is the test split, on which methods are compared. Objects are followed through whole
    films.
    """

    task = "masks"
    splits = ("train", "test")
    layout = "the folder DAVIS (JPEGImages, Annotations and ImageSets)"
    homepage = "https://davischallenge.org/davis2017/code.html"

    class Options(FilmOptions):
        size: int = Field(480, ge=8, le=1024)
        """Height of the frames, in pixels; the side of the square ones without whole."""
        whole: bool = True
        """Keep the frames' shape. false: cut out the central square, to train on."""

    def open(self, split: Split) -> Reel:
        root = self.folder()
        lists = root / "ImageSets" / "2017"
        lines = _read_list(lists / ("val.txt" if split == "test" else "train.txt"))
        folders = [
            _check_listed(root / "JPEGImages" / "480p" / line.words[0], line) for line in lines
        ]
        pictures = [list_pictures(folder) for folder in folders]
        places = [root / "Annotations" / "480p" / folder.name for folder in folders]
        masks = _find_masks(pictures, places)
        return Reel(FrameFolders([str(path) for path in folders], pictures, self.framing, masks))

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "train 60 films, test 30 (the set's validation split)",
            "labels": "masks of the objects in each frame",
            "homepage": cls.homepage,
            "searched": describe_local_folders(cls.name),
        }


SCENE = re.compile(r"_g(\d\d)_c\d+")
"""The number of the scene of an action, in the name of a film of UCF101."""
MOST_SCENES = 100
"""Scenes of an action have numbers below this one."""


@sources.register("ucf101")
class Ucf101(FilmSource):
    """UCF101, 13,320 films of 101 actions. Soomro et al. 2012 (arXiv:1212.0402).

    Read from a folder that holds the films as <class>/<film>.avi, at its top or in UCF-101, and the
    lists classInd.txt, trainlist01.txt and so on, at its top or in ucfTrainTestlist. Films of one
    scene (g01 to g25) stay together when validation films are carved from the training split.
    """

    task = "clips"
    splits = ("train", "test")
    layout = "the folders UCF-101 and ucfTrainTestlist"
    homepage = "https://www.crcv.ucf.edu/data/UCF101.php"

    class Options(FilmOptions):
        fold: int = Field(1, ge=1, le=3)
        """Which of the three official divisions into training and test films to use."""

    options: Options

    def open(self, split: Split) -> Reel:
        root = self.folder()
        lists = _nested(root, "ucfTrainTestlist")
        classes = tuple(line.words[-1] for line in _read_list(lists / "classInd.txt"))
        lines = _read_list(lists / f"{split}list{self.options.fold:02}.txt")
        films = _nested(root, "UCF-101")
        paths = [str(_check_listed(films / line.words[0], line)) for line in lines]
        labels = torch.tensor([_find_class(line, classes) for line in lines])
        scenes = labels * MOST_SCENES + torch.tensor([_find_scene(line) for line in lines])
        opened, kept = self.open_files(paths)
        return Reel(opened, labels[kept], classes, scenes[kept])

    @classmethod
    def count(cls) -> int | None:
        return 9_537

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "train 9,537 films and test 3,783 (of division 1); a tenth of the scenes of "
            "train is carved for validation",
            "classes": "101",
            "homepage": cls.homepage,
            "searched": describe_local_folders(cls.name),
        }


def _nested(root: Path, name: str) -> Path:
    """Return the folder `name` in `root`, or `root` itself if there is none."""
    return root / name if (root / name).is_dir() else root


def _find_class(line: Line, classes: tuple[str, ...]) -> int:
    """Return the class of a listed film, which is the name of its folder."""
    name = line.words[0].partition("/")[0]
    if name not in classes:
        raise UserError(f"{line.where}: '{name}' is not a class of classInd.txt")
    return classes.index(name)


def _find_scene(line: Line) -> int:
    """Return the number of a listed film's scene."""
    match = SCENE.search(line.words[0])
    if match is None:
        raise UserError(f"{line.where}: {line.words[0]} has no scene in its name, such as _g01_c01")
    return int(match[1])


@sources.register("jhmdb")
class Jhmdb(FilmSource):
    """J-HMDB, films of people with 15 joints in each frame. Jhuang et al., ICCV 2013.

    Read from a folder that holds Rename_Images/<class>/<film>/00001.png and so on,
    joint_positions/<class>/<film>/joint_positions.mat, and splits/<class>_test_split1.txt and so
    on. Joints are followed through whole films. Frames keep their aspect ratio; the code of the
    contrastive random walk squashes them to squares.
    """

    task = "keypoints"
    splits = ("train", "test")
    layout = "the folders Rename_Images, joint_positions and splits"
    homepage = "http://jhmdb.is.tue.mpg.de"

    class Options(FilmOptions):
        size: int = Field(320, ge=8, le=1024)
        """Height of the frames, in pixels; the side of the square ones without whole."""
        whole: bool = True
        """Keep the frames' shape. false: cut out the central square, to train on."""
        fold: int = Field(1, ge=1, le=3)
        """Which of the three official divisions into training and test films to use."""

    options: Options
    ROLES: ClassVar[dict[str, str]] = {"train": "1", "test": "2"}
    """What the lists write behind the films of a split."""

    def open(self, split: Split) -> Reel:
        root = self.folder()
        lists = sorted((root / "splits").glob(f"*_test_split{self.options.fold}.txt"))
        if not lists:
            raise UserError(f"{root}: has no splits/*_test_split{self.options.fold}.txt")
        folders, files = [], []
        for path in lists:
            action = path.name.rpartition("_test_split")[0]
            for line in _read_list(path):
                if line.words[-1] != self.ROLES[split]:
                    continue
                place = Path(action) / Path(line.words[0]).stem
                folders.append(_check_listed(root / "Rename_Images" / place, line))
                joints = root / "joint_positions" / place / "joint_positions.mat"
                files.append(_check_listed(joints, line))
        pictures = [list_pictures(folder) for folder in folders]
        counts = map(len, pictures)
        points = [read_joints(path, count) for path, count in zip(files, counts, strict=True)]
        names = [str(folder) for folder in folders]
        return Reel(FrameFolders(names, pictures, self.framing, points=points))

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "train 660 films and test 268 (of division 1)",
            "labels": "positions of 15 joints in each frame",
            "homepage": cls.homepage,
            "searched": describe_local_folders(cls.name),
        }


def read_joints(path: Path, length: int) -> Tensor:
    """Read the joints of a film of J-HMDB, (length, J, 2) float32; NaN in frames that have none.

    The file counts pixels from 1. Raises UserError if it is not as the set's authors write it.
    """
    from scipy.io import loadmat

    try:
        positions = loadmat(path)["pos_img"]  # (2, J, frames)
    except Exception as error:  # scipy raises errors of its own
        raise UserError(f"{path}: cannot be read as positions of joints: {error}") from None
    if positions.ndim != 3 or positions.shape[0] != 2:
        raise UserError(
            f"{path}: pos_img has the shape {positions.shape}: it should be (2, joints, frames)"
        )
    found = torch.from_numpy(positions.transpose(2, 1, 0)[:length] - 1.0).float()
    joints = torch.full((length, *found.shape[1:]), torch.nan)
    joints[: len(found)] = found
    return joints
