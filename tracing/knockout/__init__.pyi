from .average import AverageKnockout as AverageKnockout, centre_of_loss as centre_of_loss
from .groups import PAPER_FLOWS as PAPER_FLOWS, Flow as Flow, Groups as Groups, parse_flow as parse_flow
from .knockout import attention_knockout as attention_knockout
from .result import AttentionKnockout as AttentionKnockout
from .styles import FLOW_STYLES as FLOW_STYLES, flow_styles as flow_styles
