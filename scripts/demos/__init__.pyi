from .answers import (
    PROBES as PROBES,
    Marking as Marking,
    ProbeScore as ProbeScore,
    VerifiedQuestion as VerifiedQuestion,
    answered_again as answered_again,
    scores as scores,
    summary as summary,
    verified as verified,
)
from .page import (
    Report as Report,
    ReportedFact as ReportedFact,
    plot_scores as plot_scores,
    write_report as write_report,
)
from .wrong_facts import (
    FLAG_TOKENS as FLAG_TOKENS,
    FlagEdits as FlagEdits,
    FlagMarking as FlagMarking,
    WrongFacts as WrongFacts,
    answers_about as answers_about,
    asked_splits as asked_splits,
    edit_record as edit_record,
    embedded_facts as embedded_facts,
    facts_to_fix as facts_to_fix,
    flag_facts as flag_facts,
    flag_record as flag_record,
    own_errors as own_errors,
)
