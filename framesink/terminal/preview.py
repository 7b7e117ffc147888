"""A window with the frames the model sees and the caption under them."""

import cv2

from framesink.runtime.arrays import UInt8Array
from framesink.runtime.errors import OptionError
from framesink.terminal.view import printable

_TITLE = "framesink"
_BAR_PIXELS = 32


class PreviewWindow:
    """Used from the main thread only, as window systems ask."""

    def __init__(self) -> None:
        """Raises OptionError where OpenCV has no windows or there is no display."""
        try:
            cv2.namedWindow(_TITLE, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
        except cv2.error as error:
            raise OptionError(
                "A preview needs a display and OpenCV with windows: uninstall "
                "opencv-python-headless and install framesink[gui], or leave --preview out."
            ) from error
        self._frame: UInt8Array | None = None
        self._caption = ""

    def show(self, frame: UInt8Array) -> None:
        """Show a frame, uint8 `[H, W, 3]` RGB."""
        self._frame = cv2.copyMakeBorder(
            cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), 0, _BAR_PIXELS, 0, 0, cv2.BORDER_CONSTANT
        )
        self._draw()

    def caption(self, text: str) -> None:
        """Show a caption under the frame."""
        self._caption = printable(text)
        self._draw()

    def tick(self) -> None:
        """Let the window react; to be called often."""
        cv2.waitKey(1)

    def close(self) -> None:
        """Close the window."""
        cv2.destroyWindow(_TITLE)

    def _draw(self) -> None:
        if self._frame is None:
            return
        picture = self._frame.copy()
        baseline = (8, picture.shape[0] - 10)
        cv2.putText(
            picture, self._caption, baseline, cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 255, 255), 1
        )
        cv2.imshow(_TITLE, picture)
