"""BiRefNet as a Transformers model: import it, and the Auto classes and pipelines know `birefnet`."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageSegmentation
from transformers.models.auto import modeling_auto

from .configuration_birefnet import BiRefNetConfig
from .image_processing_birefnet import BiRefNetImageProcessor, BiRefNetImageProcessorPil
from .modeling_birefnet import BiRefNetForImageSegmentation, BiRefNetImageSegmentationOutput


__version__ = "0.1.0"

AutoConfig.register(BiRefNetConfig.model_type, BiRefNetConfig, exist_ok=True)
AutoModelForImageSegmentation.register(BiRefNetConfig, BiRefNetForImageSegmentation, exist_ok=True)
AutoImageProcessor.register(
    BiRefNetConfig,
    image_processor_classes={"torchvision": BiRefNetImageProcessor, "pil": BiRefNetImageProcessorPil},
    exist_ok=True,
)
# The stock pipeline checks class names against this table alone and logs an error for those registered at run time.
modeling_auto.MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES[BiRefNetConfig.model_type] = "BiRefNetForImageSegmentation"
