"""BiRefNet as a Transformers model: import it, and the Auto classes and pipelines know `birefnet`."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageSegmentation
from transformers.models.auto import modeling_auto
from transformers.pipelines import PIPELINE_REGISTRY

from .checkpoints_birefnet import NANO
from .configuration_birefnet import BiRefNetConfig
from .image_processing_birefnet import BiRefNetImageProcessor, BiRefNetImageProcessorPil
from .modeling_birefnet import BiRefNetForImageSegmentation, BiRefNetImageSegmentationOutput
from .pipeline_birefnet import BackgroundRemovalPipeline, load_pipeline


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
PIPELINE_REGISTRY.register_pipeline(
    "background-removal",
    pipeline_class=BackgroundRemovalPipeline,
    pt_model=(AutoModelForImageSegmentation,),
    type="image",
)
# With this attribute, `save_pretrained` of a pipeline would write a reference to remote code that loading then refuses.
del BackgroundRemovalPipeline._registered_impl
