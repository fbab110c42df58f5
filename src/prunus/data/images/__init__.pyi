from .batches import Augment as Augment
from .batches import ImageBatches as ImageBatches
from .batches import LoaderBatches as LoaderBatches
from .batches import plain_batches as plain_batches
from .read import read_images as read_images
from .sets import Images as Images
from .sets import matched as matched
from .sets import split_places as split_places
