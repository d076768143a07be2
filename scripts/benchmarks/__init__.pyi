from .edit import (
    WIDTH as WIDTH,
    bench_edit as bench_edit,
    hidden_of as hidden_of,
    make_edit_cases as make_edit_cases,
    measure_edit_anew as measure_edit_anew,
)
from .edit_rows import (
    EditRow as EditRow,
    apart as apart,
    describe_edit as describe_edit,
    edit_markdown as edit_markdown,
    edit_table as edit_table,
)
from .edit_solves import (
    ReuseCase as ReuseCase,
    SolveCase as SolveCase,
    as_change as as_change,
    explicit as explicit,
    explicit_flops as explicit_flops,
    make_problem as make_problem,
    thin as thin,
    thin_flops as thin_flops,
    write_with_undo as write_with_undo,
)
from .edit_values import (
    MomentCase as MomentCase,
    ValueCase as ValueCase,
    make_goals as make_goals,
    make_prompts as make_prompts,
    search_settings as search_settings,
    usual_moment as usual_moment,
    usual_search as usual_search,
)
from .flow import (
    FlowRow as FlowRow,
    bench_flow as bench_flow,
    describe_flow as describe_flow,
    flow_table as flow_table,
    measure_flow as measure_flow,
    measure_flow_anew as measure_flow_anew,
    probabilities as probabilities,
    spread_cells as spread_cells,
)
from .flow_cells import (
    DROPPED as DROPPED,
    FlowCase as FlowCase,
    make_flow_cases as make_flow_cases,
    published_scores as published_scores,
    truncated_logits as truncated_logits,
)
from .machine import (
    counted_token_layers as counted_token_layers,
    extra_mb as extra_mb,
    in_new_process as in_new_process,
    layer_cost as layer_cost,
    machine_facts as machine_facts,
    matrix_rate as matrix_rate,
    peak_mb as peak_mb,
)
from .models import (
    SHAPES as SHAPES,
    Recipe as Recipe,
    Shape as Shape,
    Subject as Subject,
    confident as confident,
    open_subject as open_subject,
    write_model as write_model,
)
from .trace import (
    TimingRow as TimingRow,
    bench_trace as bench_trace,
    describe_machine as describe_machine,
    describe_row as describe_row,
    measure_row as measure_row,
    naive_peak as naive_peak,
    table as table,
)
from .trace_cells import (
    Case as Case,
    chosen_cases as chosen_cases,
    frozen_states as frozen_states,
    make_cases as make_cases,
    run_naive as run_naive,
    run_strong as run_strong,
    run_sweep as run_sweep,
)
