"""The words that the mini's screens show, and how its answers are spelled."""

WORDS: tuple[str, ...] = tuple(
    """Save Cancel Delete Edit Open Close Search Settings Profile Logout Login Register Submit Send Reply Forward
    Archive Inbox Drafts Sent Trash Spam Home About Contact Help Support Terms Privacy Blog News Events Calendar
    Today Week Month Year Date Time Name Email Phone Address City Country State Street Company Title Message
    Subject Comment Share Like Follow Print Export Import Upload Download Copy Paste Cut Undo Redo Zoom View
    Window File Folder Image Video Audio Music Photo Gallery Map Route Train Flight Hotel Cart Checkout Buy Sell
    Price Order Total Payment Card Cash Coupon Return Refund Shipping Product Category Brand Color Size Filter
    Sort Reset Apply Confirm Accept Reject Back Next Previous First Last More Less Show Hide Expand Collapse
    Refresh Update Upgrade Install Remove Add Create Rename Move Merge Split Start Stop Pause Play Record Mute
    Volume Network Wifi Battery Display Theme Language Keyboard Mouse Printer Storage Memory Backup Restore
    Security Password Username Account Members Group Team Project Task Report Chart Table Invoice""".split()
)
"""Words that pages show in training; each is one token."""

UNSEEN_WORDS: tuple[str, ...] = tuple(
    """Approve Bookmark Browse Budget Bulletin Cluster Compare Database Dismiss Document Enable Explore Finance
    Guests History Insert Journal Launch Logs Notify Options Publish Queue Reviews Schedule Staff Switch Unlock
    Vendor Workflow""".split()
)
"""Words that no training page shows; they are spelled in letters."""

FILLER_WORDS: tuple[str, ...] = tuple(
    """the and with from this that your have been will some into over under after before during between many
    few most each every other small large new old long short early late high low open near far left right
    water light paper green white black blue river stone garden morning evening people children""".split()
)
"""Words of running text, which no question asks about."""

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

PAGE_SIZE = 224
"""Width and height of a page in pixels; also the number of intervals that coordinates are counted in."""

COORDINATES: tuple[str, ...] = tuple(f"{round(pixel * 1000 / PAGE_SIZE):03d}" for pixel in range(PAGE_SIZE))
"""One three-digit number of thousandths for each pixel column or row."""


def coordinate(pixel: float) -> str:
    """Print a pixel position as the nearest coordinate, `012` to `996`."""
    return COORDINATES[min(max(round(pixel), 0), PAGE_SIZE - 1)]


def box_text(box: tuple[float, float, float, float]) -> str:
    """Print a box in pixels as `[[x0,y0,x1,y1]]` in thousandths."""
    return "[[" + ",".join(coordinate(edge) for edge in box) + "]]"
