"""The history of the schema `whetstone`, one file a step. A step that has been released is never changed."""
