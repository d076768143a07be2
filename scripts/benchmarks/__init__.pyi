from .cases import Case as Case, chosen_cases as chosen_cases, make_cases as make_cases
from .edit_cases import (
    WIDTH as WIDTH,
    hidden_of as hidden_of,
    make_edit_cases as make_edit_cases,
    measure_edit_anew as measure_edit_anew,
)
from .edit_facts import make_goals as make_goals, make_prompts as make_prompts
from .edit_moments import MomentCase as MomentCase, usual_moment as usual_moment
from .edit_reuse import ReuseCase as ReuseCase
from .edit_rows import EditRow as EditRow, apart as apart
from .edit_solves import (
    SolveCase as SolveCase,
    as_change as as_change,
    explicit as explicit,
    explicit_flops as explicit_flops,
    make_problem as make_problem,
    thin as thin,
    thin_flops as thin_flops,
    write_with_undo as write_with_undo,
)
from .edit_tables import describe_edit as describe_edit, edit_markdown as edit_markdown, edit_table as edit_table
from .edit_values import ValueCase as ValueCase, search_settings as search_settings, usual_search as usual_search
from .extra_memory import extra_mb as extra_mb
from .flow_cases import DROPPED as DROPPED, FlowCase as FlowCase, make_flow_cases as make_flow_cases
from .flow_published import published_scores as published_scores
from .flow_tables import describe_flow as describe_flow, flow_table as flow_table
from .flow_timing import (
    FlowRow as FlowRow,
    measure_flow as measure_flow,
    measure_flow_anew as measure_flow_anew,
    probabilities as probabilities,
    spread_cells as spread_cells,
)
from .flow_truncation import truncated_logits as truncated_logits
from .machine import machine_facts as machine_facts
from .memory import naive_peak as naive_peak
from .peaks import in_new_process as in_new_process, peak_mb as peak_mb
from .rates import layer_cost as layer_cost, matrix_rate as matrix_rate
from .shapes import SHAPES as SHAPES, Shape as Shape, write_model as write_model
from .subjects import Recipe as Recipe, Subject as Subject, confident as confident, open_subject as open_subject
from .tables import describe_machine as describe_machine, describe_row as describe_row, table as table
from .timing import TimingRow as TimingRow, measure_row as measure_row
from .token_layers import counted_token_layers as counted_token_layers
from .ways import (
    frozen_states as frozen_states,
    run_naive as run_naive,
    run_strong as run_strong,
    run_sweep as run_sweep,
)
