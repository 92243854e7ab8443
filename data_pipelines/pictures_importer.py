"""Pictures with captions as documents that begin with a picture.

    pictures/
      one.png  one.txt          a caption beside each picture (png, jpg, jpeg)

or a list of captions, as `data_pipelines.clips_importer` reads it.
"""

from data_pipelines.clips_importer import Clip
from data_pipelines.documents import Document
from tml.codec.video import decode_frames
from tml.session import VideoFrame

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")


def read_picture(found: Clip) -> list[Document]:
    """The document of one picture with its caption.

    Raises:
        ValueError: the picture cannot be decoded.
    """
    data = found.path.read_bytes()
    decode_frames([VideoFrame(sample=0, data=data)])
    return [Document(document_id=found.clip_id, text=found.transcript, picture=data)]
