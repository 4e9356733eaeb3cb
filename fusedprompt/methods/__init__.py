"""Prompt-learning methods: one file a method. Importing this package registers them."""

from .cartridge import CartridgeConfig as CartridgeConfig
from .cartridge import CartridgeEncoder as CartridgeEncoder
from .cpt import CPTConfig as CPTConfig
from .cpt import CPTEmbedding as CPTEmbedding
from .cpt_template import CPTTemplate as CPTTemplate
from .method import Method as Method
from .method import Targets as Targets
from .method import find_method as find_method
from .method import method_of as method_of
from .method import register_method as register_method
from .module import PromptModule as PromptModule
from .multitask import MultitaskPromptEmbedding as MultitaskPromptEmbedding
from .multitask import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
from .multitask import MultitaskPromptTuningInit as MultitaskPromptTuningInit
from .p_tuning import PromptEncoder as PromptEncoder
from .p_tuning import PromptEncoderConfig as PromptEncoderConfig
from .p_tuning import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
from .prefix_tuning import PrefixEncoder as PrefixEncoder
from .prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
from .prompt_tuning import PromptEmbedding as PromptEmbedding
from .prompt_tuning import PromptTuningConfig as PromptTuningConfig
from .prompt_tuning import PromptTuningInit as PromptTuningInit
