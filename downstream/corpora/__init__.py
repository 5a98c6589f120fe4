"""Readers: a corpus folder in, Examples out. One row per corpus; each module is imported on use."""

from downstream.base import CORPORA

CORPORA.add("librispeech", "downstream.corpora.librispeech:read", "LibriSpeech in its own layout")
CORPORA.add("voxceleb1", "downstream.corpora.voxceleb1:read", "VoxCeleb1 identification split")
CORPORA.add(
    "voxceleb1_trials", "downstream.corpora.voxceleb1_trials:read", "VoxCeleb1 verification"
)
CORPORA.add("iemocap", "downstream.corpora.iemocap:read", "IEMOCAP, 4 classes, 5 sessions")
CORPORA.add(
    "speechocean762", "downstream.corpora.speechocean762:read", "speechocean762, 250 readers"
)
CORPORA.add("emodb", "downstream.corpora.emodb:read", "EmoDB, acted emotions, five folds")
CORPORA.add("fsdd", "downstream.corpora.fsdd:read", "Free Spoken Digit Dataset, a fold a speaker")
CORPORA.add("tedlium", "downstream.corpora.tedlium:read", "TED-LIUM 3, the first hours of it")
CORPORA.add("timit", "downstream.corpora.timit:read", "TIMIT, phones in time, core test set")
CORPORA.add("audio", "downstream.corpora.folder:read", "a folder of audio without labels")
CORPORA.add("speech_commands", "downstream.corpora.speech_commands:read", "Speech Commands v0.01")
CORPORA.add("fluent_speech_commands", "downstream.corpora.fluent_speech_commands:read", "Fluent SC")
CORPORA.add("snips", "downstream.corpora.snips:read", "Audio SNIPS, 16 voices")
CORPORA.add(
    "manifest", "downstream.corpora.manifest:read", "your own: CSV, TSV, JSONL; trials, RTTM"
)
CORPORA.add("kaldi", "downstream.corpora.kaldi:read", "Kaldi data directories, one a split")
CORPORA.add("lhotse", "downstream.corpora.lhotse:read", "Lhotse cuts, one .jsonl(.gz) a split")
CORPORA.add("nemo", "downstream.corpora.nemo:read", "NeMo's manifests, one JSON file a split")
CORPORA.add("common_voice", "downstream.corpora.common_voice:read", "Common Voice, one language")
CORPORA.add("hf_datasets", "downstream.corpora.hf_datasets:read", "HF datasets on disk, Parquet")
CORPORA.add("quesst2014", "downstream.corpora.quesst2014:read", "QUESST 2014, spoken queries")
CORPORA.add("strings", "downstream.corpora.strings:read", "spoken digits to search for in strings")
CORPORA.add("synthetic", "downstream.corpora.synthetic:read", "speech that eSpeak NG makes here")
CORPORA.add("librimix", "downstream.corpora.librimix:read", "Libri2Mix as folders of Kaldi's files")
CORPORA.add("mixtures", "downstream.corpora.mixtures:read", "two speakers mixed from any manifest")
CORPORA.add("paired", "downstream.corpora.pairs:read", "any manifest of speakers, trials by a rule")
